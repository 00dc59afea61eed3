"""Hugging Face checkpoints in and out of runs, and checked.

    python -m moe_jax.interop import google/switch-base-8 --workdir runs/switch
    python -m moe_jax.interop export --workdir runs/switch --output folder
    python -m moe_jax.interop verify folder --expected expected.npz

SOURCE is a local folder or the id of a repository on the hub. `import` takes
what is not the model's from the defaults, or from --config=configs/own.py, with
overrides: --config.mesh.expert=4.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import logging

from moe_jax import command_line, run_config, sections
from moe_jax.interop import export_run, import_run, verifying
from moe_jax.runs.checkpointer import CheckpointError


class _Parser(argparse.ArgumentParser):
  """A parser of arguments that says in one line what is wrong."""

  def error(self, message: str) -> NoReturn:
    command_line.fail(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Reads the command line; the overrides of the config are apart."""
  parser = _Parser(
    prog='python -m moe_jax.interop',
    description=__doc__.split('\n')[0],
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def command(name, run, text):
    made = commands.add_parser(name, help=text, allow_abbrev=False)
    made.set_defaults(run=run)
    made.add_argument('--traceback', action='store_true')
    return made.add_argument

  add = command('import', _import, 'a checkpoint into a new run')
  add('source', metavar='SOURCE', help="a folder, or a hub repository's id")
  add('--workdir', required=True, help='the new run')
  add('--config', default='', help="a run's config file; else the defaults")
  add('--dtype', choices=('float32', 'bfloat16'), default='')
  add('--revision', default='', help='a branch, tag or commit')
  add = command('export', _export, 'a run into a folder for transformers')
  add('--workdir', required=True, help='the run')
  add('--output', required=True, help='a new folder')
  add = command('verify', _verify, 'a checkpoint against what is expected')
  add('source', metavar='SOURCE', help="a folder, or a hub repository's id")
  add('--expected', required=True, help='an npz of what transformers computed')
  add('--revision', default='', help='a branch, tag or commit')
  options, rest = parser.parse_known_args(argv)
  unknown = [word for word in rest if not word.startswith('--config.')]
  if unknown or (rest and options.run is not _import):
    parser.error(f'unknown arguments {unknown or rest}')
  return options, rest


def _import(options: argparse.Namespace, overrides: list[str]) -> int:
  base = options.config or sections.section(run_config.RunConfig)
  config, _ = run_config.settled(
    command_line.config_of(base), command_line.config_of(base, overrides)
  )
  lines = import_run.import_run(
    options.source,
    options.workdir,
    config,
    dtype=options.dtype,
    revision=options.revision,
  )
  print('\n'.join(lines))
  return 0


def _export(options: argparse.Namespace, _: list[str]) -> int:
  print('\n'.join(export_run.export_run(options.workdir, options.output)))
  return 0


def _verify(options: argparse.Namespace, _: list[str]) -> int:
  verdict = verifying.verify(
    options.source, options.expected, revision=options.revision
  )
  print(verdict.describe())
  return 0 if verdict.good else 1


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command; its status says whether all is well."""
  options, overrides = parse(sys.argv[1:] if argv is None else argv)
  logging.set_verbosity(logging.WARNING)
  command_line.ignore_closed_loops()
  try:
    status = options.run(options, overrides)
  except (CheckpointError, OSError, ValueError) as error:
    if options.traceback:
      raise
    command_line.fail(str(error))
  sys.exit(status)


if __name__ == '__main__':
  main()
