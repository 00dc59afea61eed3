"""A run's folder: names of its files, and the config to which it belongs."""

import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from etils import epath

from moe_jax.config import Section, difference, flatten, plain
from moe_jax.data import tokenizers
from moe_jax.data.cache_folders import sha256
from moe_jax.data.plain_files import read_json
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError
from moe_jax.runs.ownership import FILE_PREFIX
from moe_jax.runs.storage_errors import storage_path

CONFIG = 'config.json'
CONFIG_SHA256 = 'config.sha256'  # sha256 of the config as the run wrote it
CONFIG_PY = 'this_config.py'  # reads the config, for flags --config
CHECKPOINTS = 'checkpoints'
TOKENIZER = tokenizers.RUN_FILE
IMPORTED = 'huggingface'  # files of the checkpoint that the run began with
PLUGINS = 'plugins.json'  # sha256 of each file with a user's own class
_CONFIG_PY = '''"""The config of the run in this folder.

    python -m moe_jax.main --config=FOLDER/this_config.py --workdir=FOLDER
"""

import pathlib

from moe_jax import run_config


def get_config():
  return run_config.from_file(pathlib.Path(__file__).with_name('config.json'))
'''
_SECTIONS = ('model', 'data', 'sharding', 'checkpoint')
_PACKAGE = 'moe_jax'
# The end of an error about a config with keys that options no longer have.
OLDER = (
  'if it was made before 2026-12-01, commit d9e62315 of moe_jax reads it, with '
  'options that have since been renamed or removed'
)


def folder_of(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """The folder that `workdir` names, which need not exist.

  Raises:
    ValueError: The name is empty, a URL, or that of a file.
  """
  name = os.fspath(workdir)
  if not name:
    raise InputError("--workdir='' is empty: give the folder of the run")
  if '://' in name:
    raise InputError(
      f'--workdir={name}: rows are appended to metrics, which buckets do not '
      'allow; give a folder, and the URL to checkpoint.directory'
    )
  try:
    folder = pathlib.Path(workdir).expanduser()
  except RuntimeError as error:  # no such user
    raise InputError(f'--workdir={name}: {error}') from None
  if folder.exists() and not folder.is_dir():
    raise InputError(f'--workdir={folder} is a file; it must be a folder')
  return folder


class Workdir(NamedTuple):
  """A folder that a run may use, as `check` has found.

  Attributes:
    folder: The folder, which need not exist.
    checkpoints: The directory of the run's checkpoints.
    class_digests: The sha256 of the file of each user's class that the run's
      config names, by the class's name.
    notes: A line for each key of the config whose value in the folder's config
      differs, and for each file in `class_digests` that has changed since the
      run began.
  """

  folder: pathlib.Path
  checkpoints: epath.Path
  class_digests: dict[str, str]
  notes: list[str]


def check(
  workdir: str | os.PathLike[str],
  config: Section,
  *,
  resume: bool = False,
  defaults: Section | None = None,
) -> Workdir:
  """Checks that a run with this config may use a folder; writes nothing.

  Args:
    workdir: A folder of this machine or mounted on it, which need not exist.
    config: The config of the run.
    resume: Whether the folder may belong to another config.
    defaults: A config with the defaults of all keys, for keys that the
      folder's config lacks; None gives no defaults.

  Raises:
    ValueError: The name is not that of a folder; the folder's config cannot be
      read, or differs, in which case the differences are listed, old before
      new; its checkpoints are not in the directory that `config` gives; or that
      directory may hold checkpoints of another run.
  """
  folder = folder_of(workdir)
  changes = []
  if (folder / CONFIG).exists():
    stored = flatten(kept_config(folder))
    usual = flatten(defaults or {})
    changes = [
      f'{key}: {old!r} -> {new!r}'
      for key, (old, new) in difference(stored, config).items()
      if key in stored or key not in usual or plain(new) != plain(usual[key])
    ]
    if changes and not resume:
      lines = [f'  {line}' for line in changes]
      lines.append('choose another --workdir, or go on in it with --resume')
      if stored.keys() - flatten(config):
        lines.append(OLDER)
      text = '\n'.join(lines)
      raise InputError(f'{folder} holds a run whose config differs:\n{text}')
  checkpoints = _checked_directory(
    folder, cast(Any, config)['checkpoint']['directory'], resume
  )
  digests = class_digests(classes_in(config))
  old_digests = read_json(folder / PLUGINS)
  notes = [f'going on with another config: {line}' for line in changes]
  notes += [
    f'WARNING: the file of {name!r} has changed since the run wrote it '
    f'down: sha256 {old!s:.12} -> {digest:.12}'
    for name, digest in digests.items()
    if (old := old_digests.get(name)) not in (None, digest)
  ]
  return Workdir(folder, checkpoints, digests, notes)


def _checked_directory(
  folder: pathlib.Path, directory: str, resume: bool
) -> epath.Path:
  """The directory of a run's checkpoints.

  `directory` is the option `checkpoint.directory`; '' is the one in `folder`.
  ValueError is raised for another directory than before, where the run would
  begin anew, and, unless `resume`, for a directory that may be another run's,
  from whose checkpoints the run would go on.
  """
  is_used = (folder / CHECKPOINTS).exists() or (folder / CONFIG).exists()
  old, new = checkpoints_of(folder), checkpoints_of(folder, directory)
  if is_used and old != new:
    raise InputError(
      f'{folder} has its checkpoints in {old}; checkpoint.directory='
      f'{directory!r} says otherwise, and cannot change'
    )
  if is_used or resume or not new.exists():
    return new
  if any(not path.name.startswith(FILE_PREFIX) for path in new.iterdir()):
    raise InputError(
      f'{folder} is a new run and checkpoint.directory={os.fspath(new)!r} is '
      'not empty: it may be of another run; choose another, or go on from what '
      'is there with --resume'
    )
  return new


def checkpoints_of(
  folder: pathlib.Path, directory: str | None = None
) -> epath.Path:
  """The directory of a run's checkpoints.

  Args:
    folder: The run's folder.
    directory: The option `checkpoint.directory`; None takes it from the config
      in the folder.
  """
  if directory is None:
    directory = kept_config(folder).get('checkpoint', {}).get('directory', '')
  return storage_path(directory or folder / CHECKPOINTS)


def claim(folder: pathlib.Path, config: Section) -> None:
  """Makes a folder that `check` allowed, and writes the config into it.

  Another config in the folder is kept as `config.0.json`, `config.1.json`, ...
  `this_config.py`, always the same text, reads the config as a config file.

  Raises:
    OSError: The folder cannot be made or written.
  """
  folder.mkdir(parents=True, exist_ok=True)
  write_text(folder / CONFIG_PY, _CONFIG_PY)
  path = folder / CONFIG
  if path.exists():
    if not difference(kept_config(folder), config):
      return
    set_aside(path)
  text = _text(plain(config))
  # The sha256 is written first: a kill leaves no config with another's sha256.
  write_text(folder / CONFIG_SHA256, f'{_sha256(text)}\n')
  write_text(path, text)


def check_unedited(folder: pathlib.Path) -> None:
  """Raises ValueError where the config is not as the run wrote it.

  The parameters may fit an edited config, whose model computes something else.
  Folders of earlier versions, which have no sha256 of the config, are not
  checked.
  """
  path = folder / CONFIG_SHA256
  found = _sha256(_text(read_json(folder / CONFIG)))
  if path.exists() and path.read_bytes().strip() != found.encode():
    raise InputError(
      f'{folder / CONFIG} has changed since the run wrote it: its values have '
      f'sha256 {found:.12}, not that in {path}. The checkpoints may be of '
      f'another model: undo the change, or delete {path.name} to keep it'
    )


def check_kept_ids(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
  """Checks that token ids mean the same as in the run that a folder holds.

  The task of the data may add ids after those of the tokenizer in the folder.
  A tokenizer's file that cannot be read, such as one that a killed run of an
  earlier version left, is ignored.

  Args:
    folder: The folder of the run.
    tokenizer: The tokenizer of the data.

  Raises:
    ValueError: The folder has a tokenizer whose ids mean other tokens.
  """
  path = folder / TOKENIZER
  try:
    kept = tokenizers.load(path)
  except (OSError, InputError):
    return
  (old, old_names), (new, new_names) = map(_with_names, (kept, tokenizer))
  if old == new and new_names[: len(old_names)] == old_names:
    return
  raise InputError(
    f'{folder} has parameters of tokens of {kept.ids_identity}, the data is of '
    f"{tokenizer.ids_identity}; give data.tokenizer.kind='file' and {path} as "
    'data.tokenizer.file.path'
  )


def _with_names(tokenizer: Tokenizer) -> tuple[str, tuple[str, ...]]:
  """The identity of a tokenizer's ids, and the names of ids that a task added.

  The ids that the task added are not part of the identity.
  """
  if isinstance(tokenizer, tokenizers.Extended):
    return tokenizer.base.ids_identity, tokenizer.names
  return tokenizer.ids_identity, ()


def record_plugins(folder: pathlib.Path, config: Section) -> None:
  """Writes the sha256 of each file with a user's own class into the folder."""
  digests = class_digests(classes_in(config))
  if digests or (folder / PLUGINS).exists():
    write_text(folder / PLUGINS, _text(digests))


def check_allowed(names: Iterable[str], allowed: Iterable[str]) -> None:
  """Raises ValueError for a class whose module the user has not allowed.

  A run's folder may have been written by somebody else, and importing a class
  that it names runs code. Names in a config file or on the command line are
  the user's own and are not checked.

  Args:
    names: Names of the classes that a folder names, 'module:name'.
    allowed: Modules and packages that the user allows.
  """
  allowed = {_PACKAGE, *allowed}
  for name in names:
    module = name.partition(':')[0]
    if not any(f'{module}.'.startswith(f'{parent}.') for parent in allowed):
      raise InputError(
        f'{name!r} stands in a folder that was read, and its module is not '
        f'allowed; if you trust it, pass --allow_module={module}'
      )


def classes_in(config: Section) -> tuple[str, ...]:
  """The names, 'module:name', of the users' classes in a config, sorted.

  Args:
    config: A config, or a section of one, as nested mappings.
  """
  names = {
    value
    for key, value in flatten(config).items()
    if f'.{key}'.endswith('.kind') and isinstance(value, str) and ':' in value
  }
  return tuple(sorted(names))


def class_digests(names: Iterable[str]) -> dict[str, str]:
  """The sha256 of the file that defines each class, by the class's name.

  Classes of this package are left out, as the package's version stands for
  their code.

  Args:
    names: Names of classes, 'module:name'.

  Raises:
    ValueError: The module of a class has no file.
  """
  digests = {}
  for name in names:
    module = name.partition(':')[0]
    if module.split('.')[0] == _PACKAGE:
      continue
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
      raise InputError(f'{name!r}: {module} has no file')
    digests[name] = sha256(pathlib.Path(spec.origin))
  return digests


def _sha256(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _text(values: dict[str, Any]) -> str:
  return json.dumps(values, indent=2, sort_keys=True) + '\n'


def kept_config(folder: pathlib.Path) -> dict[str, Any]:
  """The config in a run's folder; {} if there is none.

  Raises:
    ValueError: The config is damaged.
  """
  path = folder / CONFIG
  config = read_json(path)
  for name in _SECTIONS:
    if not isinstance(values := config.get(name, {}), dict):
      raise InputError(
        f'{path} is damaged: {name}={values!r:.60} is no section'
      )
  directory = config.get('checkpoint', {}).get('directory', '')
  if not isinstance(directory, str):
    raise InputError(
      f'{path} is damaged: checkpoint.directory={directory!r:.60} is no text'
    )
  return config


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames `a.json` to the first free of `a.0.json`, `a.1.json`, and so on."""
  number = 0
  while (
    aside := path.with_name(f'{path.stem}.{number}{path.suffix}')
  ).exists():
    number += 1
  return path.rename(aside)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file, which at any moment has its whole old or new text."""
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_text(text, encoding='utf-8')
  unfinished.replace(path)
