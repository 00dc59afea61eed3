"""A run's folder: whose it is, and what is in it by name.

Not here: what the files hold (`checkpointer.py`, `metrics.py`), and a run that
is read back (`trained.py`).
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from moe_jax import plugins, sections
from moe_jax.section_reader import Section

CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
TOKENIZER = 'tokenizer.json'
IMPORTED = 'huggingface'  # the files of the checkpoint that a run began as
PLUGINS = 'plugins.json'  # the sha256 of each file of a user's classes
# The last commit that reads and writes folders whose config has the keys that
# it had before options were dataclasses.
_LAST_OF_EARLIER = '7875f9b'


def check(
  workdir: str | os.PathLike[str],
  config: Section,
  *,
  resume: bool = False,
) -> pathlib.Path:
  """The folder, if `config` may have it; nothing is written.

  Args:
    workdir: A folder of this machine or mounted on it, which need not exist.
    config: What the run is.
    resume: Whether the folder of another config will do.

  Raises:
    ValueError: It is a URL or a file, its config cannot be read, or it is
      another run's: then the differences are listed, old before new. Or its
      checkpoints are elsewhere than `config` has them, or that is another's.
  """
  if '://' in os.fspath(workdir):
    raise ValueError(
      f'--workdir={workdir}: rows are appended to metrics, which buckets do '
      'not allow; give a folder, and the URL to checkpoint.directory'
    )
  folder = pathlib.Path(workdir).expanduser()
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'--workdir={folder} is a file; it must be a folder')
  changes = sections.difference(kept_config(folder), _plain(config))
  if changes and (folder / CONFIG).exists() and not resume:
    listed = [f'  {key}: {a!r} -> {b!r}' for key, (a, b) in changes.items()]
    raise ValueError(
      f'{folder} holds another run; its config differs:\n'
      + '\n'.join(listed)
      + '\nchoose another --workdir, or go on in it with --resume'
    )
  _check_directory(folder, config, resume)
  return folder


def _check_directory(
  folder: pathlib.Path, config: Section, resume: bool
) -> None:
  """A run would begin anew, or go on from another's checkpoints, unasked."""
  there = (folder / CHECKPOINTS).exists() or (folder / CONFIG).exists()
  given = config['checkpoint']['directory']
  old, new = checkpoints_of(folder), checkpoints_of(folder, given)
  if there and old != new:
    raise ValueError(
      f'{folder} has its checkpoints in {old}; checkpoint.directory={given!r} '
      'says otherwise, and cannot change'
    )
  if there or resume or not new.exists():
    return
  if any(True for _ in new.iterdir()):
    raise ValueError(
      f'{folder} is a new run and checkpoint.directory={os.fspath(new)!r} is '
      'not empty: it may be of another run; choose another, or go on from what '
      'is there with --resume'
    )


def checkpoints_of(
  folder: pathlib.Path, directory: str | None = None
) -> epath.Path:
  """Where a run's checkpoints are.

  Args:
    folder: The run's folder.
    directory: The option `checkpoint.directory`; None is what the folder's own
      config says.
  """
  if directory is None:
    directory = kept_config(folder).get('checkpoint', {}).get('directory', '')
  return epath.Path(directory or folder / CHECKPOINTS)


def claim(folder: pathlib.Path, config: Section) -> None:
  """Makes a checked folder the config's own, making it if need be.

  Another config that it held is kept as `config.0.json`, `config.1.json`, ...

  Raises:
    OSError: The folder cannot be made or written.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / CONFIG
  if path.exists():
    if not sections.difference(kept_config(folder), _plain(config)):
      return
    number = 0
    while (aside := folder / f'config.{number}.json').exists():
      number += 1
    path.rename(aside)
  write_text(path, _text(_plain(config)))


def record_plugins(folder: pathlib.Path, config: Section) -> None:
  """Writes the sha256 of each file of a user's classes beside the config."""
  digests = plugins.digests(plugins.names_in(config))
  if digests or (folder / PLUGINS).exists():
    write_text(folder / PLUGINS, _text(digests))


def changed_plugins(folder: pathlib.Path, config: Section) -> Iterator[str]:
  """A line for each file of a user's classes that is another than before."""
  before = _json(folder / PLUGINS)
  for name, digest in plugins.digests(plugins.names_in(config)).items():
    old = before.get(name)
    if old not in (None, digest):
      yield (
        f'WARNING: the file of {name!r} has changed since the run wrote it '
        f'down: sha256 {old:.12} -> {digest:.12}'
      )


def _plain(config: Section) -> dict[str, Any]:
  """Through JSON, so that tuples compare equal to what was written."""
  nested = config if isinstance(config, dict) else config.to_dict()
  return json.loads(json.dumps(nested))


def _text(values: dict[str, Any]) -> str:
  return json.dumps(values, indent=2, sort_keys=True) + '\n'


def kept_config(folder: pathlib.Path) -> dict[str, Any]:
  """The config that a folder keeps; {} where it keeps none.

  Raises:
    ValueError: It is damaged, or of an earlier version.
  """
  config = _json(folder / CONFIG)
  if isinstance(config.get('data', {}).get('source'), str):
    raise ValueError(
      f'{folder} is a run of an earlier version, whose options had other '
      f'names. Commit {_LAST_OF_EARLIER} is the last that reads it: use that, '
      'or train again in another folder'
    )
  return config


def _json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is damaged: {error}') from None


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a whole file or none of it."""
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_text(text, encoding='utf-8')
  unfinished.replace(path)
