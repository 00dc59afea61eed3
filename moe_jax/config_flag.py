"""The flag --config of a training command: a config file, with overrides.

config_flag.define()
options, ignored = config_flag.read()  # once the flags are parsed
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ml_collections
from absl import flags
from ml_collections import config_flags

from moe_jax import config_file, run_config
from moe_jax.errors import InputError

_NAME = 'config'
# The argument of a config that shrinks it; see `moe_jax.configs.base.finish`.
_RUNLOCAL = 'runlocal'


def define() -> None:
  """Defines the flag; a command line without it is refused."""
  config_flags.DEFINE_config_file(
    _NAME,
    None,
    'Path of a config file, own.py, or name of one, moe_jax:tiny_switch; '
    '--config.seed=1 overrides a value.',
    # New keys belong to open sections; `command_line.parse` refuses all others.
    accept_new_attributes=True,
    lock_config=False,
  )
  flags.mark_flag_as_required(_NAME)


def value() -> ml_collections.ConfigDict:
  """The config with the overrides of the command line."""
  return cast(ml_collections.ConfigDict, flags.FLAGS[_NAME].value)


def file_name() -> str:
  """The name of the config file without its folders; '' without the flag."""
  values = flags.FLAGS
  # The flag may have been defined after the command line was parsed.
  if not values.is_parsed() or _NAME not in values or not values[_NAME].value:
    return ''
  spec = config_flags.get_config_filename(values[_NAME])
  return spec.rpartition('/')[2]


def ignored_lines(ignored: Mapping[str, Any]) -> Iterator[str]:
  """A line for each value that `read` says is ignored."""
  for name, value in ignored.items():
    yield f'{name}={value!r} has no effect with these flags; ignored'


def replaced_lines() -> Iterator[str]:
  """A line for each part of the data that ':runlocal' has replaced."""
  spec = config_flags.get_config_filename(flags.FLAGS[_NAME])
  base_spec, colon, argument = spec.rpartition(':')
  if not colon or argument != _RUNLOCAL:
    return
  before, after = (
    config_file.flatten(config_file.load_config(name).data)
    for name in (base_spec, spec)
  )
  chosen_values = config_file.flatten(value().data)
  for key, new in after.items():
    old = before.get(key, new)
    if key.endswith('kind') and old != new == chosen_values.get(key):
      yield f'{_RUNLOCAL}: data.{key} {old!r} -> {new!r}'


def read() -> tuple[run_config.RunConfig, dict[str, Any]]:
  """The options of the command line, checked as a whole.

  Returns:
    The options; and, by name, values of the file that are ignored because a
    flag chose another kind, for which they have no meaning.

  Raises:
    ValueError: The message gives everything that is wrong, by name.
  """
  spec = config_flags.get_config_filename(flags.FLAGS[_NAME])
  return run_config.settled(config_file.load_config(spec), value())


def other_problems(argv: Sequence[str]) -> list[str]:
  """The problems of a command line beside keys that do not exist."""
  try:
    options_of(*config_file.known_flags(argv))
  except InputError as error:
    return str(error).splitlines()
  return []


def options_of(
  spec: str, overrides: Sequence[str] = ()
) -> tuple[run_config.RunConfig, dict[str, Any]]:
  """The options of a config file with overrides, checked as `read` does.

  Args:
    spec: The config's path or name; see `config_file.load_config`.
    overrides: Flags such as '--config.seed=1'.

  Returns:
    The options, and the ignored values by name; see `read`.

  Raises:
    ValueError: The message gives everything that is wrong, by name.
  """
  config = config_file.config_of(spec, overrides)
  return run_config.settled(config_file.load_config(spec), config)
