"""A run's folder: names of its files, and the config to which it belongs."""

import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import ml_collections
from etils import epath

from moe_jax.config import ConfigDict, Section, difference, flatten
from moe_jax.data import tokenizers
from moe_jax.errors import InputError
from moe_jax.runs.ownership import FILE_PREFIX
from moe_jax.runs.storage_errors import storage_path

CONFIG = 'config.json'
CONFIG_SHA256 = 'config.sha256'  # of the config as the run wrote it
CONFIG_PY = 'this_config.py'  # the same, for commands that take config files
CHECKPOINTS = 'checkpoints'
TOKENIZER = tokenizers.RUN_FILE
IMPORTED = 'huggingface'  # files of the Hugging Face checkpoint it began with
PLUGINS = 'plugins.json'  # sha256 of each file with a user's own class
_SECTIONS = ('model', 'data', 'sharding', 'checkpoint')
_PACKAGE = 'moe_jax'
# The last commit that reads folders whose config has the keys from before
# options were dataclasses.
_LAST_OF_EARLIER = '7875f9b'
# Options that are gone, with the value at which they meant nothing; None is for
# an option that changed no number, and for the section of a kind that is gone,
# which means nothing unless it was chosen.
_GONE: dict[str, Any] = {
  'aux_losses.num_steps': 1000,
  'data.source.cipher': None,
  'data.source.digits': None,
  'data.source.kv_recall': None,
  'data.source.npz': None,
  'data.source.tfds.image_feature': 'image',
  'data.source.tfds.label_feature': 'label',
  'data.source.tfds.max_shift': 4,
  'data.source.vowels': None,
  'model.adaptive': None,
  'model.deep_moe': None,
  'model.feature_shape': [],
  'model.moe.dispatch.dropless.exchange.dtype': '',
  'model.moe.dispatch.dropless.exchange.ring_group': None,
  'model.moe.dispatch.dropless.shadowing.rule': 'algorithm_1',
  'model.moe.dispatch.einsum.exchange.chunks': None,
  'model.moe.dispatch.einsum.exchange.dtype': '',
  'model.moe.dispatch.einsum.exchange.ring_group': None,
  'model.moe.dispatch.einsum.shadowing.rule': 'algorithm_1',
  'model.moe.dispatch.gather.exchange.chunks': None,
  'model.moe.dispatch.gather.exchange.dtype': '',
  'model.moe.dispatch.gather.exchange.ring_group': None,
  'model.moe.dispatch.gather.shadowing.rule': 'algorithm_1',
  'model.moe.dispatch.sorted.exchange.dtype': '',
  'model.moe.dispatch.sorted.exchange.ring_group': None,
  'model.moe.dispatch.sorted.shadowing.rule': 'algorithm_1',
  'model.moe.expert.format.group_size': 0,
  'model.moe.expert.format.symmetric': False,
  'model.moe.router.topology.limit_by': 'fraction',
  'model.moe.router.topology.local_gb_per_second': 15.75,
  'model.moe.router.topology.network_gb_per_second': 6.25,
  'model.moe.router.topology.variant': 'published',
  'model.numerics.kernels.group_size': 0,
  'model.numerics.kernels.name': '',
  'model.numerics.kernels.num_codes': 0,
  'model.numerics.kernels.symmetric': False,
  'trace.num_steps': 0,
  'trace.start_step': 1,
}
# Values that are gone, with one that gives the same numbers.
_SAME: dict[str, dict[str, str]] = {
  **{
    f'model.moe.dispatch.{kind}.exchange.kind': {'all_to_all': 'constraint'}
    for kind in ('einsum', 'gather')
  },
  **{
    f'model.moe.dispatch.{kind}.exchange.kind': {'ring': 'all_to_all'}
    for kind in ('dropless', 'sorted')
  },
  **{
    f'model.moe.dispatch.{kind}.backend': {'ragged_dot': 'auto'}
    for kind in ('dropless', 'sorted')
  },
}


def folder_of(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """The folder of that name, which need not exist.

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


def check(
  workdir: str | os.PathLike[str],
  config: Section,
  *,
  resume: bool = False,
  defaults: Section | None = None,
) -> pathlib.Path:
  """The folder, if a run with this config may use it; nothing is written.

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
      directory may hold another run's.
  """
  folder = folder_of(workdir)
  differences = changes(folder, config, defaults)
  if differences and not resume:
    raise InputError(
      f'{folder} holds a run whose config differs:\n'
      + '\n'.join(f'  {line}' for line in differences)
      + '\nchoose another --workdir, or go on in it with --resume'
    )
  _check_directory(folder, config, resume)
  return folder


def changes(
  folder: pathlib.Path, config: Section, defaults: Section | None = None
) -> list[str]:
  """Lines on the keys whose values in a folder differ, old before new.

  Arguments are those of `check`; a folder without a config has no lines.
  """
  if not (folder / CONFIG).exists():
    return []
  stored, usual_values = (
    flatten(values) for values in (kept_config(folder), _plain(defaults or {}))
  )
  return [
    f'{key}: {old!r} -> {new!r}'
    for key, (old, new) in difference(stored, _plain(config)).items()
    if key in stored or key not in usual_values or new != usual_values[key]
  ]


def _check_directory(
  folder: pathlib.Path, config: Section, resume: bool
) -> None:
  """Raises ValueError for a directory of checkpoints that does not fit.

  Otherwise the run would begin anew, or go on from another run's checkpoints.
  """
  is_used = (folder / CHECKPOINTS).exists() or (folder / CONFIG).exists()
  directory = cast(Any, config)['checkpoint']['directory']
  old, new = checkpoints_of(folder), checkpoints_of(folder, directory)
  if is_used and old != new:
    raise InputError(
      f'{folder} has its checkpoints in {old}; checkpoint.directory='
      f'{directory!r} says otherwise, and cannot change'
    )
  if is_used or resume or not new.exists():
    return
  if any(not path.name.startswith(FILE_PREFIX) for path in new.iterdir()):
    raise InputError(
      f'{folder} is a new run and checkpoint.directory={os.fspath(new)!r} is '
      'not empty: it may be of another run; choose another, or go on from what '
      'is there with --resume'
    )


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
  """Writes the config into a folder that `check` allowed, and makes it.

  Another config in it is kept as `config.0.json`, `config.1.json`, ...

  Raises:
    OSError: The folder cannot be made or written.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / CONFIG
  if path.exists():
    if not difference(kept_config(folder), _plain(config)):
      return
    number = 0
    while (aside := folder / f'config.{number}.json').exists():
      number += 1
    path.rename(aside)
  text = _text(_plain(config))
  # Before the config, so that a kill between leaves no config of another sum.
  write_text(folder / CONFIG_SHA256, f'{_sha256(text)}\n')
  write_text(path, text)


def check_unedited(folder: pathlib.Path) -> None:
  """Raises ValueError where the config is not as the run wrote it.

  Parameters may fit a model that computes something else. Runs of earlier
  versions, which wrote no sum, are taken as they are.
  """
  path = folder / CONFIG_SHA256
  found = _sha256(_text(_json(folder / CONFIG)))
  if path.exists() and path.read_bytes().strip() != found.encode():
    raise InputError(
      f'{folder / CONFIG} has changed since the run wrote it: its values have '
      f'sha256 {found:.12}, not that in {path}. The checkpoints may be of '
      f'another model: undo the change, or delete {path.name} to keep it'
    )


def record_plugins(folder: pathlib.Path, config: Section) -> None:
  """Writes the sha256 of each file with a user's own class into the folder."""
  digests = class_digests(classes_in(config))
  if digests or (folder / PLUGINS).exists():
    write_text(folder / PLUGINS, _text(digests))


def changed_plugins(folder: pathlib.Path, config: Section) -> Iterator[str]:
  """A line for each file with a user's own class that has changed."""
  old_digests = _json(folder / PLUGINS)
  for name, digest in class_digests(classes_in(config)).items():
    old = old_digests.get(name)
    if old not in (None, digest):
      yield (
        f'WARNING: the file of {name!r} has changed since the run wrote it '
        f'down: sha256 {old!s:.12} -> {digest:.12}'
      )


def check_allowed(names: Iterable[str], allowed: Iterable[str]) -> None:
  """Raises ValueError for a class that a folder names and the user forbids.

  Names in a config file or on the command line are the user's own; a folder
  may have been written by somebody else, and importing runs code.

  Args:
    names: Names of classes, 'module:name'.
    allowed: Modules and packages that the user allows.
  """
  allowed = {_PACKAGE, *allowed}
  for name in names:
    module = name.partition(':')[0]
    parents = module.split('.')
    if not any(
      '.'.join(parents[: i + 1]) in allowed for i in range(len(parents))
    ):
      raise InputError(
        f'{name!r} stands in a folder that was read, and its module is not '
        f'allowed; if you trust it, pass --allow_module={module}'
      )


def classes_in(
  config: Mapping[str, Any] | ml_collections.ConfigDict,
) -> tuple[str, ...]:
  """The users' classes that a config names, sorted.

  Args:
    config: A config, or a section of one, as nested mappings.
  """
  names = set()
  for key, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      names.update(classes_in(value))
    elif key == 'kind' and isinstance(value, str) and ':' in value:
      names.add(value)
  return tuple(sorted(names))


def class_digests(names: Iterable[str]) -> dict[str, str]:
  """The sha256 of the file of each class, by its name.

  Modules of this package are left out: their version is that of the package.

  Raises:
    ValueError: A module has no file.
  """
  sha256 = {}
  for name in names:
    module = name.partition(':')[0]
    if module.split('.')[0] == _PACKAGE:
      continue
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
      raise InputError(f'{name!r}: {module} has no file')
    data = pathlib.Path(spec.origin).read_bytes()
    sha256[name] = hashlib.sha256(data).hexdigest()
  return sha256


def _plain(config: Section) -> dict[str, Any]:
  """A config as JSON gives it back, to be compared with that of a file."""
  values = config.to_dict() if isinstance(config, ConfigDict) else config
  return json.loads(json.dumps(values))


def _sha256(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _text(values: dict[str, Any]) -> str:
  return json.dumps(values, indent=2, sort_keys=True) + '\n'


def kept_config(folder: pathlib.Path) -> dict[str, Any]:
  """The config in a run's folder; {} if there is none.

  Raises:
    ValueError: It is damaged, or of an earlier version.
  """
  path = folder / CONFIG
  config = _json(path)
  section_values = {name: config.get(name, {}) for name in _SECTIONS}
  for name, values in section_values.items():
    if not isinstance(values, dict):
      raise InputError(
        f'{path} is damaged: {name}={values!r:.60} is no section'
      )
  directory = section_values['checkpoint'].get('directory', '')
  if not isinstance(directory, str):
    raise InputError(
      f'{path} is damaged: checkpoint.directory={directory!r:.60} is no text'
    )
  if isinstance(section_values['data'].get('source'), str):
    raise InputError(
      f'{folder} is a run of an earlier version, whose options had other '
      f'names. Commit {_LAST_OF_EARLIER} is the last that reads it: use that, '
      'or train again in another folder'
    )
  for name, usual in _GONE.items():
    _forget(config, name.split('.'), usual)
  for name, same in _SAME.items():
    *parents, key = name.split('.')
    section: Any = config
    for parent in parents:
      section = section.get(parent) if isinstance(section, dict) else None
    if isinstance(section, dict) and key in section:
      section[key] = same.get(str(section[key]), section[key])
  return config


def _forget(section: dict[str, Any], path: list[str], usual: Any) -> None:
  """Removes an option that is gone, and a section that has no other.

  One with another value stays, and is refused by its name where it is read.
  """
  name, *rest = path
  value = section.get(name)
  if rest and isinstance(value, dict):
    _forget(value, rest, usual)
    if not value:
      del section[name]
  elif not rest and name in section and (usual is None or value == usual):
    del section[name]


def _json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path} is damaged: {error}') from None
  if not isinstance(values, dict):
    raise InputError(f'{path} is damaged: {values!r:.60} is no JSON object')
  return values


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that at any moment it is the old or the new one."""
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_text(text, encoding='utf-8')
  unfinished.replace(path)
