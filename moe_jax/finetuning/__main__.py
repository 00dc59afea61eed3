"""Chooses experts for a task, and keeps adapters in files of their own.

    python -m moe_jax.finetuning choose --workdir=runs/tiny --share=0.2 \
      --output=experts.json
    python -m moe_jax.finetuning save --workdir=runs/lora --output=adapter
    python -m moe_jax.finetuning merge --adapter=adapter --workdir=runs/tiny \
      --output=runs/merged

`choose` takes the data of --config=own.py instead of the run's own,
with overrides: --config.data.seq_len=64.
"""

import argparse
import pathlib
from collections.abc import Sequence

from moe_jax import cli
from moe_jax.data import DataOptions
from moe_jax.errors import InputError
from moe_jax.finetuning import adapters, choose_experts


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Parses a command; None takes the program's own words.

  Returns:
    The options, and overrides of a config, such as --config.data.seq_len=64.
  """
  parser = cli.parser('moe_jax.finetuning', __doc__)
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def command(name, run, text, workdir, output):
    subparser = commands.add_parser(name, help=text, **cli.about(__doc__))
    subparser.set_defaults(run=run)
    subparser.add_argument('--workdir', required=True, help=workdir)
    subparser.add_argument('--output', required=True, help=output)
    cli.add_traceback(subparser)
    cli.add_allow_module(subparser)
    return subparser.add_argument

  add = command(
    'choose',
    _choose,
    'writes the experts that a task uses most',
    'folder of the run',
    'file for config.trained_experts',
  )
  text = 'share p of the use, to 1'
  add('--share', type=cli.SHARE, required=True, help=text)
  add('--score', choices=[*choose_experts.SCORES], default='gate')
  add('--batches', type=cli.POSITIVE, default=8, help='of the training split')
  add('--config', default='', help="config of other data than the run's")
  run, new = 'folder of the run', 'new folder'
  save = command('save', _save, 'writes the adapter of a run', run, new)
  text, base = 'adds an adapter to its base', 'folder of the base'
  merge = command('merge', _merge, text, base, new)
  merge('--adapter', required=True, help='folder that `save` wrote')
  for add in (save, merge):
    text = 'step of the checkpoint; default: the newest good one'
    add('--step', type=cli.NOT_NEGATIVE, help=text)
  return cli.parse_command(parser, argv)


def _choose(options: argparse.Namespace, overrides: list[str]) -> str:
  data_options = None
  if options.config:
    data_options = cli.said_options(
      DataOptions, options.config, overrides, 'data'
    )
  output = pathlib.Path(options.output).expanduser()
  if output.exists():
    raise InputError(f'{output} is there already; give a new file')
  experts = choose_experts.choose(
    options.workdir,
    share=options.share,
    score=options.score,
    num_batches=options.batches,
    options=data_options,
    allow=options.allow_module,
  )
  experts.write(output)
  return (
    f'{experts.describe()}; train them alone with --config.trainable=experts '
    f'--config.trained_experts={output}'
  )


def _save(options: argparse.Namespace, _: list[str]) -> str:
  return adapters.save(
    options.workdir,
    options.output,
    step=options.step,
    allow=options.allow_module,
  )


def _merge(options: argparse.Namespace, _: list[str]) -> str:
  return adapters.merge(
    options.adapter,
    options.workdir,
    options.output,
    step=options.step,
    allow=options.allow_module,
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command and prints what it has done."""
  print(cli.run_command(*parse(argv)))


if __name__ == '__main__':
  main()
