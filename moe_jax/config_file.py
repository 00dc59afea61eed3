"""Config files, by path or by name, and their overrides, `--config.key=value`.

A path is 'configs/tiny_switch.py'. A name is 'moe_jax:tiny_switch', for the
file `tiny_switch.py` of the package `moe_jax.configs`, and works in every
folder; configs of another installed package are named alike. Text after one
more colon is the argument of `get_config`.

absl and ml_collections parse the flags. For a key that does not exist they
raise a KeyError without its path, so the keys are looked up here first.
"""

import copy
import importlib
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import ml_collections
from absl import flags
from ml_collections import config_flags

from moe_jax.errors import InputError
from moe_jax.options import (
  OptionError,
  unknown,
  unknown_key_text,
  unknown_text,
)
from moe_jax.sections import flatten

_MOE_JAX = 'moe_jax'
_PACKAGE = re.compile(r'[a-zA-Z_]\w*(\.[a-zA-Z_]\w*)*')
_NO_BOOLEAN = re.compile(r"\('Non-boolean argument to boolean flag', (.*)\)")
_NO_INTEGER = re.compile(r'invalid literal for int\(\) with base 10: (.*)')


def config_of(
  base: str | ml_collections.ConfigDict, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Returns a config with `--config.key=value` overrides applied.

  Args:
    base: A config, or its path or name; see `load_config`.
    overrides: Flags such as '--config.seed=1'.

  Raises:
    ValueError: The file or a key does not exist, or a value has another type.
  """
  # Overrides are set in the config.
  config = load_config(base) if isinstance(base, str) else copy.deepcopy(base)
  argv = ['', *overrides]
  _check_keys(config, dict(_options(argv)))
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_dict(
    'config',
    config,
    '',
    flag_values=values,
    accept_new_attributes=True,
    lock_config=False,
    sys_argv=argv,
  )
  try:
    values(argv)
  except flags.Error as error:
    raise InputError(flag_problem(error)) from None
  return holder.value


def flag_problem(error: Exception) -> str:
  """A line on a wrong flag, which says what it should be."""
  message = str(error).strip().splitlines()[0]
  if message.startswith('flag --config=None:'):
    return (
      '--config is missing: the config of the run, such as '
      '--config=moe_jax:tiny_switch'
    )
  message = _NO_BOOLEAN.sub(r'\1 is no boolean; give the flag alone', message)
  return _NO_INTEGER.sub(r'\1 is no integer; give one, such as 1000', message)


def load_config(spec: str) -> ml_collections.ConfigDict:
  """The config of a file.

  Args:
    spec: Path 'configs/name.py' or name 'moe_jax:name', either of which may end
      in ':argument'.

  Raises:
    ValueError: The file does not exist, cannot be run, has no `get_config`,
      refuses the argument, or returns something else than a config.
  """
  file, path, argument = _locate(spec)
  module = _run(file, path)
  if not hasattr(module, 'get_config'):
    raise InputError(f'{file} defines no get_config(arg)')
  try:
    config = module.get_config(*([argument] if argument else []))
  except InputError as error:
    raise InputError(f'{file}: {error}') from error
  except Exception as error:
    raise InputError(_error_text(file, path, error)) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise InputError(
      f'{file}: get_config returned a {type(config).__name__}, not a ConfigDict'
    )
  return config


def _locate(spec: str) -> tuple[str, pathlib.Path, str]:
  """The name of a config's file in messages, its path, and the argument.

  Raises:
    ValueError: There is no such file.
  """
  file, _, argument = spec.partition(':')
  path = pathlib.Path(file)
  if path.is_file():
    return file, path, argument
  if _PACKAGE.fullmatch(file) and path.suffix != '.py' and ':' in spec:
    name, _, argument = argument.partition(':')
    files = package_configs(file)
    if name not in files:
      raise unknown(f'config of {file}', name, files)
    return f'{file}:{name}', files[name], argument
  files = package_configs(_MOE_JAX)
  hint = f'{_MOE_JAX}:{path.stem} works in every folder'
  if path.stem not in files:
    hint = f'{_MOE_JAX}:NAME works in every folder, for NAME: '
    hint += unknown_text('config', path.stem, files)
  problem = f'does not exist under {os.getcwd()}'
  if path.is_dir():
    problem = 'is a folder, and a config is a file'
  raise InputError(f'config file {file!r} {problem}; {hint}')


def package_configs(package: str) -> dict[str, pathlib.Path]:
  """The files of a package's configs by name, sorted.

  Args:
    package: Name of an installed package, whose configs are the files of its
      package `configs`.

  Raises:
    ValueError: The package or its `configs` cannot be imported.
  """
  try:
    folders = importlib.import_module(f'{package}.configs').__path__
  except (ImportError, AttributeError) as error:
    raise InputError(
      f'package {package!r} has no configs: {error}; a config is a file, '
      f'configs/own.py, or a name, {_MOE_JAX}:tiny_switch'
    ) from None
  files = {
    path.stem: path
    for folder in folders
    for path in sorted(pathlib.Path(folder).glob('*.py'))
  }
  files.pop('__init__', None)
  return files


def with_paths(argv: Sequence[str]) -> list[str]:
  """The words of a command line, with a path where --config gives a name.

  ml_collections reads paths alone.

  Raises:
    ValueError: The config's file does not exist.
  """
  words = list(argv)
  for i, word in enumerate(words[1:], start=1):
    flag, equals, spec = word.partition('=')
    if word.startswith('-') and flag.lstrip('-') == 'config':
      at = i if equals else i + 1
      _, path, argument = _locate(spec if equals else words[at])
      words[at] = f'{flag}=' * bool(equals) + f'{path}:{argument}'.rstrip(':')
  return words


def _run(file: str, path: pathlib.Path) -> types.ModuleType:
  """The module of a config file; raises ValueError that names the file."""
  loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
  spec = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
  module = importlib.util.module_from_spec(cast(Any, spec))
  try:
    loader.exec_module(module)
  except ModuleNotFoundError as error:
    raise InputError(
      f'{file}: {error}; modules of your own are looked for in '
      f'{os.getcwd()} and PYTHONPATH'
    ) from None
  except Exception as error:
    raise InputError(_error_text(file, path, error)) from error
  return module


def _error_text(file: str, path: pathlib.Path, error: Exception) -> str:
  """The message for an error of a config file, with the line it is in."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if pathlib.Path(frame.filename) == path
  ]
  line = getattr(error, 'lineno', None) or (lines[-1] if lines else None)
  location = file if line is None else f'{file}, line {line}'
  message = getattr(error, 'msg', None) or str(error)
  return f'{location}: {type(error).__name__}: {message}'


def check_flags(argv: Sequence[str]) -> None:
  """Checks the config file and the keys that a command line names.

  Raises:
    OptionError: Keys do not exist; all are listed.
    ValueError: The file cannot be read.
  """
  options = dict(_options(argv))
  spec = options.pop('config', None)
  if spec is not None:
    _check_keys(load_config(spec), options)


def _check_keys(
  config: ml_collections.ConfigDict, options: Mapping[str, str]
) -> None:
  """Raises OptionError with all options that are no keys of the config."""
  config_keys = flatten(config)
  problems = [
    unknown_key_text(name, _siblings(name, config_keys))
    + _section_hint(config, name)
    for name in _unknown_keys(config, options)
  ]
  if problems:
    raise OptionError(problems)


def _unknown_keys(
  config: ml_collections.ConfigDict, options: Iterable[str]
) -> Iterator[str]:
  """The names of options that are no keys of the config."""
  config_keys = flatten(config)
  for key in options:
    name = key.removeprefix('config.')
    if name != key and name not in config_keys and not _is_open(config, name):
      yield name


def known_flags(argv: Sequence[str]) -> tuple[str, list[str]]:
  """The config that a command line names, and the overrides of keys it has.

  Raises:
    ValueError: The file cannot be read.
  """
  options = dict(_options(argv))
  spec = options.pop('config', '')
  bad = {f'config.{key}' for key in _unknown_keys(load_config(spec), options)}
  overrides = []
  for word, after in zip(argv[1:], [*argv[2:], '--']):
    name, equals, _ = word.lstrip('-').partition('=')
    if word.startswith('-') and name.startswith('config.') and name not in bad:
      overrides += [word] if equals or after.startswith('-') else [word, after]
  return spec, overrides


def _is_open(config: ml_collections.ConfigDict, name: str) -> bool:
  """Whether `name` may be a new key: its section exists and is not locked."""
  *parents, key = name.split('.')
  for part in parents:
    section = config.get(part)
    if not isinstance(section, ml_collections.ConfigDict):
      return False
    config = section
  return key not in config and not config.is_locked


def _section_hint(config: ml_collections.ConfigDict, name: str) -> str:
  """Text on the flag that sets a key in an open section; '' in a locked one.

  No flag replaces a section, and one that does not exist is given as a whole.
  """
  path, rest = '', name.split('.')
  while rest and rest[0] in config:
    config = cast(Any, config[rest[0]])
    path += f'.{rest.pop(0)}'
    if not isinstance(config, ml_collections.ConfigDict):
      return ''
  if not path or config.is_locked:
    return ''
  if not rest:
    return f'; {name} is a section, whose keys are set: --config{path}.KEY=...'
  text = '...'
  for key in reversed(rest[1:]):
    text = f"{{'{key}': {text}}}"
  return f'; a new section is given whole: --config{path}.{rest[0]}="{text}"'


def _options(argv: Sequence[str]):
  """The (name, value) pairs of `--name=value` and `--name value`."""
  for i, word in enumerate(argv[1:], start=1):
    if word.startswith('-') and word.lstrip('-').startswith('config'):
      name, equals, value = word.lstrip('-').partition('=')
      if not equals:
        value = argv[i + 1] if i + 1 < len(argv) else ''
      yield name, value


def _siblings(name: str, config_keys: dict[str, Any]) -> list[str]:
  """The existing keys beside the first part of `name` that does not exist."""
  name_parts = name.split('.')
  prefix = ''
  for part in name_parts:
    if not any(key.startswith(f'{prefix}{part}.') for key in config_keys):
      break
    prefix += f'{part}.'
  depth = prefix.count('.') + 1
  siblings = [key for key in config_keys if key.startswith(prefix)]
  return sorted({'.'.join(key.split('.')[:depth]) for key in siblings})
