"""Tables of bad inputs: each input with the message that it has to get.

A file `test_<part>.py` has a list of `Case`s and one test:

    @pytest.mark.parametrize('case', CASES, ids=Case.id)
    def test_refused(case, tmp_path):
      check(case, tmp_path)

`call` gets an empty folder. It may write the bad input there, and then calls
the function or command that has to refuse it. Everything that it wrote before
the refusal has to be there afterwards, unchanged, and nothing else: a case that
makes its input in the folder hands it over by `frozen(folder)`.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest

from moe_jax.cli import REPORTED

_MOST_LINES = 12
_snapshots: dict[pathlib.Path, dict[str, str]] = {}


@dataclasses.dataclass(frozen=True)
class Case:
  """A bad input.

  Attributes:
    name: Name of the case in the list of tests.
    call: Gets an empty folder, and gives the bad input to what refuses it.
    phrases: Parts of the message: the value, the rule, the name of a file.
    errors: Types of the error.
    most_lines: The most lines that the message may have.
  """

  name: str
  call: Callable[[pathlib.Path], Any]
  phrases: tuple[str, ...]
  errors: tuple[type[Exception], ...] = REPORTED
  most_lines: int = _MOST_LINES

  def id(self) -> str:
    """The name, as pytest's `ids` asks for it."""
    return self.name


def frozen(folder: pathlib.Path) -> pathlib.Path:
  """Remembers a folder's content, which a refusal must leave as it is."""
  _snapshots[folder] = _content(folder)
  return folder


def check(case: Case, folder: pathlib.Path) -> None:
  """Checks that the message has the phrases, and that nothing is written."""
  try:
    with pytest.raises(case.errors) as error:
      case.call(folder)
    after = _content(folder)
    before = _snapshots.get(folder, {})
  finally:
    _snapshots.pop(folder, None)
  assert_message(str(error.value), case.phrases, case.most_lines)
  assert after == before, 'the refusal changed files'


def check_command(
  main: Callable[[list[str]], Any],
  argv: list[str],
  phrases: tuple[str, ...],
  capsys,
  *,
  status: int = 1,
) -> None:
  """Checks that a command ends with a message and a status.

  Args:
    main: Runs the command with these arguments, in this process.
    argv: The arguments.
    phrases: Parts of the message on standard error.
    capsys: The fixture of pytest.
    status: The status with which the command ends.
  """
  capsys.readouterr()
  with pytest.raises(SystemExit) as ended:
    main(argv)
  errors = capsys.readouterr().err
  assert ended.value.code == status, errors
  assert_message(errors, phrases, _MOST_LINES)


def assert_message(
  text: str, phrases: tuple[str, ...], most_lines: int
) -> None:
  """Checks that a message has the phrases, few lines and no traceback."""
  assert 'Traceback' not in text, text
  assert not re.search(r'site-packages|File ".*", line \d', text), text
  assert len(text.strip().splitlines()) <= most_lines, text
  for phrase in phrases:
    assert phrase in text, f'{phrase!r} is not in: {text}'


def _content(folder: pathlib.Path) -> dict[str, str]:
  """Returns a file's digest or a link's target, by path below a folder."""
  content = {}
  for path in sorted(folder.rglob('*')):
    name = str(path.relative_to(folder))
    if path.is_symlink():
      content[name] = f'-> {path.readlink()}'
    elif path.is_file():
      content[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
      content[name] = 'folder' if path.is_dir() else 'special'
  return content
