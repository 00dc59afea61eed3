"""Makes a sparse model small, one command for each way.

    python -m moe_jax.compression quantize --run=runs/tiny --output=runs/int4 \
      --format=int4
    python -m moe_jax.compression prune --run=runs/tiny --output=runs/half \
      --share=0.5
    python -m moe_jax.compression COMMAND --help

Each command but rates and keep_logits reads the folder of a run, trained or
imported, and writes that of a new one. A command that takes --config=own.py
reads what data to use from there, with overrides: --config.data.seq_len=64.
"""

import argparse
from collections.abc import Sequence

from moe_jax import cli
from moe_jax.compression import (
  extract,
  fewer_command,
  quantize,
  rates,
  teacher_logits,
)

# The function `add` of each module adds commands to the parser. The default
# `run` of a command is the function that carries it out: it gets the parsed
# options and the overrides of a config, and returns a text to print.
MODULES = teacher_logits, extract, fewer_command, quantize, rates


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Parses a command; None takes the program's own words.

  Returns:
    The options, and overrides of a config, such as --config.data.seq_len=64.
  """
  parser = cli.parser('moe_jax.compression', __doc__)
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for module in MODULES:
    module.add(commands)
  for command in commands.choices.values():
    cli.add_traceback(command)
    cli.add_allow_module(command)
  return cli.parse_command(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command, and prints the text that it returns."""
  print(cli.run_command(*parse(argv)))


if __name__ == '__main__':
  main()
