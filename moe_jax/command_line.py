"""Command lines: their flags are parsed, and mistakes reported in a line.

absl and ml_collections parse the flags. For a key that does not exist they
raise a KeyError without its path, so the keys are looked up here first.
"""

import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from moe_jax.options import unknown
from moe_jax.sections import flatten

# Exit status (EX_TEMPFAIL) of a run that SIGTERM stopped before its last step;
# the same command goes on with it.
STOPPED = 75


def fail(text: str) -> NoReturn:
  """Prints the reason and ends the program with status 1."""
  print(f'moe_jax: {text}', file=sys.stderr)
  sys.exit(1)


def say(lines: Iterable[str]) -> None:
  """Prints lines; a reader that closes the pipe early is no error."""
  try:
    for line in lines:
      print(line)
    sys.stdout.flush()
  except BrokenPipeError:
    # Python would report the pipe once more when it closes the stream.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ignore_closed_loops() -> None:
  """Silences a report that each thread of a failed save would print.

  Threads of the storage library that still write when a save has failed each
  report that the event loop they belong to is closed.
  """
  before = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)

  sys.unraisablehook = hook


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags for `app.run`; a wrong one ends the program in a few lines."""
  try:
    _check_config(argv)
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, OSError) as error:
    fail(str(error).strip().splitlines()[0])


def config_of(
  base: str | ml_collections.ConfigDict, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Returns a config with `--config.key=value` overrides applied.

  Args:
    base: A config, or the path of its file, 'configs/name.py'.
    overrides: Flags such as '--config.seed=1'.

  Raises:
    ValueError: The file or a key does not exist, or a value has another type.
  """
  values = flags.FlagValues()
  options = dict(
    flag_values=values, accept_new_attributes=True, lock_config=False
  )
  if isinstance(base, str):
    argv = ['', f'--config={base}', *overrides]
    _check_config(argv)
    config = config_flags.DEFINE_config_file(
      'config', None, '', sys_argv=argv, **options
    )
  else:
    argv = ['', *overrides]
    _check_keys(base, dict(_options(argv)))
    config = config_flags.DEFINE_config_dict(
      'config', base, '', sys_argv=argv, **options
    )
  try:
    values(argv)
  except flags.Error as error:
    raise ValueError(str(error).strip().splitlines()[0]) from None
  return config.value


def _check_config(argv: Sequence[str]) -> None:
  """Raises ValueError for a config file or key that does not exist."""
  options = dict(_options(argv))
  spec = options.pop('config', None)
  if spec is not None:
    _check_keys(load_config(spec), options)


def _check_keys(
  config: ml_collections.ConfigDict, options: Mapping[str, str]
) -> None:
  """Raises ValueError for an option that is no key of the config."""
  known = flatten(config)
  for key in options:
    name = key.removeprefix('config.')
    if name == key or name in known or _is_open(config, name):
      continue
    raise unknown('config key', name, _siblings(name, known))


def _is_open(config: ml_collections.ConfigDict, name: str) -> bool:
  """Whether `name` may be a new key: its section exists and is not locked."""
  *parents, key = name.split('.')
  for part in parents:
    config = config.get(part)
    if not isinstance(config, ml_collections.ConfigDict):
      return False
  return key not in config and not config.is_locked


def _options(argv: Sequence[str]):
  """The (name, value) pairs of `--name=value` and `--name value`."""
  for i, word in enumerate(argv[1:], start=1):
    if word.startswith('-') and word.lstrip('-').startswith('config'):
      name, equals, value = word.lstrip('-').partition('=')
      if not equals:
        value = argv[i + 1] if i + 1 < len(argv) else ''
      yield name, value


def _siblings(name: str, known: dict[str, Any]) -> list[str]:
  """The existing keys beside the first part of `name` that does not exist."""
  parts = name.split('.')
  right = ''
  for part in parts:
    if not any(key.startswith(f'{right}{part}.') for key in known):
      break
    right += f'{part}.'
  depth = right.count('.') + 1
  beside = [key for key in known if key.startswith(right)]
  return sorted({'.'.join(key.split('.')[:depth]) for key in beside})


def load_config(spec: str) -> ml_collections.ConfigDict:
  """The config of 'configs/name.py' or 'configs/name.py:argument'.

  Raises:
    ValueError: The file does not exist, has no `get_config`, or refuses the
      argument.
  """
  file, _, argument = spec.partition(':')
  path = pathlib.Path(file)
  if not path.is_file():
    raise ValueError(
      f'config file {file!r} does not exist under {os.getcwd()}; commands run '
      "from the repository's root, where configs/ is"
    )
  module_spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except ModuleNotFoundError as error:
    raise ValueError(
      f'{file}: {error}; commands run from the root of the repository, where '
      'configs/ is'
    ) from None
  if not hasattr(module, 'get_config'):
    raise ValueError(f'{file} defines no get_config(arg)')
  return module.get_config(*([argument] if argument else []))
