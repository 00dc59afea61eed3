"""Bad inputs that were once silent, lost something or were let in.

The tables are in `arrays.py`, `files.py` and `commands.py`. What follows from
the declaration of an option is in `test_options.py`.
"""

import logging
import pathlib

import jaxtyping
import pytest

from tests.bad_inputs import arrays, files
from tests.bad_inputs.cases import Case, check, check_command
from tests.bad_inputs.commands import COMMANDS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('case', [*arrays.CASES, *files.CASES], ids=Case.id)
def test_refused(case, tmp_path, monkeypatch):
  # Users have no checks of the types of arguments, as tests may.
  monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
  check(case, tmp_path)


@pytest.mark.parametrize(
  ('command', 'phrases'),
  COMMANDS,
  ids=[' '.join(c[1])[:60] for c, _ in COMMANDS],
)
def test_a_command(command, phrases, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  level = logging.getLogger('jax').level
  main, words = command
  argv = [word.format(folder=tmp_path) for word in words]
  if argv and argv[0].endswith('/own.py'):
    (tmp_path / 'own.py').write_text(argv.pop())
    argv.append(f'--workdir={tmp_path}/x')
  try:
    check_command(main, argv, (*phrases.split(' | '),), capsys)
  finally:  # commands silence JAX for their own process
    logging.getLogger('jax').setLevel(level)
  left = {path.name for path in tmp_path.iterdir()}
  assert left <= {'own.py', '__pycache__'}  # Python's own cache of modules
