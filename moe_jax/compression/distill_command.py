"""The command that trains a run which learns from another.

    python -m moe_jax.compression distill --teacher=runs/tiny \
      --config=moe_jax:tiny_switch --workdir=runs/student \
      --config.model.moe.num_experts=0

It is `python -m moe_jax.main` with `--config.distill.teacher`, which has more
flags: what belongs to training is there.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

from moe_jax import command_line


def add(commands: Any) -> None:
  """Adds the command `distill`, which is `moe_jax.main` with a teacher."""
  command = commands.add_parser(
    'distill',
    help='trains a run that learns from another',
    **command_line.about(__doc__),
  )
  command.set_defaults(run=_run)
  add = command.add_argument
  add('--teacher', required=True, help='folder of the teacher')
  add('--config', required=True, help="the student's config")
  add('--workdir', required=True, help="the student's folder")
  add('--resume', action='store_true', help='go on although the config differs')


def main_arguments(
  options: argparse.Namespace, overrides: Iterable[str]
) -> list[str]:
  """The arguments of `moe_jax.main` that the command stands for."""
  return [
    f'--config={options.config}',
    f'--workdir={options.workdir}',
    f'--config.distill.teacher={options.teacher}',
    *overrides,
    *(f'--allow_module={name}' for name in options.allow_module),
    *['--resume'] * options.resume,
    *['--traceback'] * options.traceback,
  ]


def _run(options: argparse.Namespace, overrides: list[str]) -> str:
  """Becomes `moe_jax.main`, which the loop of training belongs to."""
  command = [sys.executable, '-m', 'moe_jax.main']
  command += main_arguments(options, overrides)
  os.execv(sys.executable, command)
