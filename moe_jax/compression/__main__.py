"""Makes a sparse model small, one command for each way.

    python -m moe_jax.compression --help
    python -m moe_jax.compression COMMAND --help

Each command reads the folder of a run, trained or imported, and writes that of
a new one. A command that takes --config=configs/own.py reads its data, or what
its help says, from there, with overrides: --config.data.seq_len=64.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from moe_jax import command_line
from moe_jax.compression import (
  distill_command,
  extract,
  keep_logits,
  merge,
  prune,
  quantize_command,
  rates,
)

# Each adds one command to the parser, with `run`, the function that is called
# with the parsed options and the overrides of a config, and returns a text.
COMMANDS: tuple[Callable[[Any], None], ...] = (
  distill_command.add,
  keep_logits.add,
  extract.add,
  merge.add,
  prune.add,
  quantize_command.add,
  rates.add,
)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns overrides of the config separately."""
  parser = command_line.Parser(
    prog='python -m moe_jax.compression',
    description=__doc__.split('\n')[0],
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for add in COMMANDS:
    add(commands)
  for command in commands.choices.values():
    command.add_argument('--traceback', action='store_true')
    command.add_argument('--allow_module', action='append', default=[])
  options, rest = parser.parse_known_args(argv)
  unknown = [word for word in rest if not word.startswith('--config.')]
  if unknown or (rest and not getattr(options, 'config', '')):
    parser.error(f'unknown arguments {unknown or rest}')
  return options, rest


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command."""
  options, overrides = parse(sys.argv[1:] if argv is None else argv)
  logging.set_verbosity(logging.WARNING)
  command_line.ignore_closed_loops()
  with command_line.reported(options.traceback):
    print(options.run(options, overrides))


if __name__ == '__main__':
  main()
