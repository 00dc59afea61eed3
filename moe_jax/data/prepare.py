"""Tokenizes the data of a config in advance, by many processes or machines.

    python -m moe_jax.data.prepare --config=moe_jax:tiny_switch \
      --config.data.source.kind=files \
      --config.data.source.files.pattern='books/*.jsonl.gz' --processes=8

A run with the same `data` section then finds the tokens in the cache, the same
that it would have made by itself. A runner of Apache Beam does the work on
several machines (`pip install 'moe_jax[beam]'`); its own flags follow after
`--`, and the tokens are kept at a URL, from where runs copy them:

      --config.data.cache_dir=gs://bucket/cache --runner=DataflowRunner \
      -- --project=project --region=europe-west1

Work that was killed goes on with the same command, also with another number of
processes or another runner. Only files of more than about 32 MiB in all (kind
`files`) are tokenized by several processes, other sources by one.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich import progress

from moe_jax import cli
from moe_jax.data.dataset import DataOptions, load
from moe_jax.data.pieces import POOL, Engine
from moe_jax.errors import InputError


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command `argv`, in which '--' precedes flags of Beam's runner."""
  argv = sys.argv[1:] if argv is None else [*argv]
  end = argv.index('--') if '--' in argv else len(argv)
  parser = cli.parser('moe_jax.data.prepare', __doc__)
  cli.add_config(parser)
  add = parser.add_argument
  text = 'number of processes on this host; by default one for each core'
  add('--processes', type=cli.POSITIVE, default=os.cpu_count() or 1, help=text)
  text = (
    f"'{POOL}' for processes of this machine, or the name of a runner of "
    "Apache Beam, such as 'DataflowRunner', whose flags follow after --"
  )
  add('--runner', default=POOL, help=text)
  parser.set_defaults(run=_run, arguments=argv[end + 1 :])
  cli.run_command(*cli.parse_command(parser, argv[:end]))


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
  if options.arguments and options.runner == POOL:
    raise InputError(f'--runner={POOL} has no flags {options.arguments}')
  data = cli.said_options(DataOptions, options.config, overrides, 'data')
  # A run that begins with another run's parameters tokenizes its data by that
  # run's tokenizer, so that the same tokens are prepared.
  config = cli.config_of(options.config, overrides)
  begin: Any = config.get('init_from', {})
  if begin.get('workdir') and begin.get('keep_tokenizer', True):
    data = data.with_tokenizer_of(begin.get('workdir'))
  columns = progress.Progress.get_default_columns()  # name, bar, ..., time left
  sizes = progress.DownloadColumn(binary_units=True)
  speed = progress.TransferSpeedColumn()
  with progress.Progress(*columns, sizes, speed) as bars:
    bar_of = {}

    def on_progress(name: str, done: int, total: int) -> None:
      if name not in bar_of:  # pieces made before have no part in the speed
        bar_of[name] = bars.add_task(name, completed=done, total=total)
      bars.update(bar_of[name], completed=done)

    arguments = tuple(options.arguments)
    engine = Engine(options.processes, options.runner, arguments, on_progress)
    dataset = load(data, engine)
  cache = data.selection.cache / 'tokens'
  cli.say([dataset.describe(), f'tokens: {cache}'])


if __name__ == '__main__':
  main()
