"""The flag --config of every command: a config file, with overrides.

config_flag.define()
options, ignored = config_flag.read()  # once the flags are parsed
"""

from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from moe_jax import command_line, run_config

_NAME = 'config'


def define() -> None:
  """Defines the flag, which the command then needs."""
  config_flags.DEFINE_config_file(
    _NAME,
    None,
    'A file of configs/, with overrides: --config.seed=1.',
    # Keys of open sections are new; all others are looked up before.
    accept_new_attributes=True,
    lock_config=False,
  )
  flags.mark_flag_as_required(_NAME)


def value() -> ml_collections.ConfigDict:
  """The config with the overrides of the command line."""
  return flags.FLAGS[_NAME].value


def read() -> tuple[run_config.RunConfig, dict[str, Any]]:
  """The options, and the values that overrides made meaningless, by name.

  Raises:
    ValueError: All that is wrong, by name.
  """
  spec = config_flags.get_config_filename(flags.FLAGS[_NAME])
  return run_config.settled(command_line.load_config(spec), value())
