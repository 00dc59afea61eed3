"""Imports, exports and verifies Hugging Face checkpoints.

    python -m moe_jax.interop import google/switch-base-8 --workdir runs/switch
    python -m moe_jax.interop export --workdir runs/switch --output folder
    python -m moe_jax.interop verify folder --expected expected.npz

`import` and `verify` read a local folder, or a repository on the hub by its id.
A checkpoint does not decide all options of the new run. The others are those of
--config=own.py, or else the defaults; --config.mesh.expert=4 changes one of
them. `verify` compares logits and greedily generated tokens with those that
transformers computed, which expected.npz holds.
"""

import argparse
import sys
from collections.abc import Sequence

from moe_jax import cli, run_config
from moe_jax.config import section_of
from moe_jax.interop import export_run, import_run, verifying

_EXAMPLES = [line for line in (__doc__ or '').splitlines() if '-m' in line]


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns overrides of the config separately."""
  parser = cli.parser('moe_jax.interop', __doc__)
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def command(name, run, text):
    lines = [line for line in _EXAMPLES if f' {name} ' in line]
    about = cli.about('\n\n'.join([f'It {text}.', *lines]))
    added = commands.add_parser(name, help=text, **about)
    added.set_defaults(run=run)
    cli.add_traceback(added)
    return added.add_argument

  source = 'folder, or id of a repository on the hub'
  revision = 'branch, tag or commit of a repository'
  add = command('import', _import, 'makes a new run from a checkpoint')
  add('source', metavar='SOURCE', help=source)
  add('--workdir', required=True, help='folder of the new run')
  add('--config', default='', help=f'{cli.CONFIG}; else the defaults')
  text = "of parameters and products; else the checkpoint's own"
  add('--dtype', choices=('float32', 'bfloat16'), default='', help=text)
  add('--revision', default='', help=revision)
  add = command('export', _export, 'writes a run for transformers')
  add('--workdir', required=True, help='folder of the run')
  add('--output', required=True, help='new folder')
  cli.add_allow_module(commands.choices['export'])
  add = command('verify', _verify, 'compares outputs with those expected')
  add('source', metavar='SOURCE', help=source)
  add('--expected', required=True, help='npz file of outputs of transformers')
  add('--revision', default='', help=revision)
  return cli.parse_command(parser, argv, lambda options: options.run is _import)


def _import(options: argparse.Namespace, overrides: list[str]) -> int:
  base = options.config or section_of(run_config.RunConfig)
  config, _ = run_config.options_of(base, overrides)
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
  lines = export_run.export_run(
    options.workdir, options.output, allow=options.allow_module
  )
  print('\n'.join(lines))
  return 0


def _verify(options: argparse.Namespace, _: list[str]) -> int:
  verdict = verifying.verify(
    options.source, options.expected, revision=options.revision
  )
  print(verdict.describe())
  return 0 if verdict.good else 1


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command and exits; status 0 is success."""
  sys.exit(cli.run_command(*parse(argv)))


if __name__ == '__main__':
  main()
