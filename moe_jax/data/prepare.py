"""Tokenizes the data of a config in advance, by many processes or machines.

    python -m moe_jax.data.prepare --config=moe_jax:tiny_switch \
      --config.data.source.kind=files \
      --config.data.source.files.pattern='books/*.jsonl.gz' --processes=8

A run with the same `data` section then finds the tokens in the cache, the same
that it would have made by itself. On several machines a runner of Apache Beam
(`pip install 'moe_jax[beam]'`) does it, whose own flags follow after `--`; the
tokens are kept at a URL, from where runs copy them:

      --config.data.cache_dir=gs://bucket/cache --runner=DataflowRunner \
      -- --project=project --region=europe-west1

What is killed goes on with the same command, or with another number of
processes or another runner. Sources that are small or made on the spot are
tokenized by one process.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from moe_jax import cli
from moe_jax.data.dataset import DataOptions, load, shared_tokenizer
from moe_jax.data.pieces import POOL, Engine, Report, make
from moe_jax.errors import InputError


def prepare(
  options: DataOptions, engine: Engine = Engine(), *, console: Console
) -> dict[str, Report]:
  """Tokenizes every source of the data into the cache.

  Args:
    options: The options under `data` of a config.
    engine: The processes or the runner that tokenize.
    console: Console that shows the progress.

  Returns:
    The report on each folder, by the name of the source in the mixture; '' for
    a single source.

  Raises:
    ValueError: The data is missing or bad.
  """
  task, selection, mixed = options.task, options.selection, options.mixture
  tokenizer = shared_tokenizer(options) if mixed.sources else options.tokenizer
  reports = {}
  for name, source in sorted(mixed.sources.items()) or [('', options.source)]:
    try:
      corpus = task.open(source, selection)
      with _bar(corpus.name, console) as on_progress:
        own = engine._replace(on_progress=on_progress)
        reports[name] = make(corpus, tokenizer, selection, own)
    except InputError as error:
      where = f'mixture.sources.{name}: ' * bool(name)
      raise InputError(f'{where}{error}') from error
  return reports


@contextlib.contextmanager
def _bar(name: str, console: Console) -> Iterator[Callable[[int, int], None]]:
  """Shows a bar of a source's progress; yields the function that moves it."""
  with Progress(
    *Progress.get_default_columns(),  # name, bar, percentage, time left
    DownloadColumn(binary_units=True),
    TransferSpeedColumn(),
    console=console,
  ) as progress:

    def on_progress(done: int, total: int) -> None:
      if not progress.tasks:  # pieces made before have no part in the speed
        progress.add_task(name, completed=done, total=total)
      progress.update(progress.tasks[0].id, completed=done)

    yield on_progress


def _lines(
  options: DataOptions,
  reports: Mapping[str, Report],
  engine: Engine,
  seconds: float,
) -> Iterator[str]:
  """Yields lines on what was done, and on the data if it is complete."""
  read = sum(report.bytes_read for report in reports.values())
  existing = sum(report.num_existing for report in reports.values())
  peak = max(report.peak_bytes for report in reports.values())
  if read:
    rate = read / seconds / 1e6
    by = f'{engine.processes} processes'
    by = by if engine.runner == POOL else engine.runner
    yield (
      f'read {read / 1e6:,.1f} MB in {seconds:,.1f} s, {rate:.2f} MB/s by '
      f'{by}; at most {peak / 2**20:,.0f} MiB of memory in one of them'
    )
  if existing:
    yield f'{existing} pieces were there already'
  # The first run that uses the folder reads it through, to check its digests.
  yield load(dataclasses.replace(options, cache_digests=False)).describe()
  folders = sorted({str(report.folder) for report in reports.values()})
  yield f'tokens: {", ".join(folders)}'


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns overrides of the config separately.

  Arguments that follow '--' are flags of the runner of Apache Beam.
  """
  argv = sys.argv[1:] if argv is None else [*argv]
  end = argv.index('--') if '--' in argv else len(argv)
  parser = cli.parser('moe_jax.data.prepare', __doc__)
  cli.add_config(parser)
  parser.add_argument(
    '--processes',
    type=cli.POSITIVE,
    default=os.cpu_count() or 1,
    help='number of processes on this host; by default one for each core',
  )
  parser.add_argument(
    '--runner',
    default=POOL,
    help=f"'{POOL}' for processes of this machine, or the name of a runner of "
    "Apache Beam, such as 'DataflowRunner', whose flags follow after --",
  )
  parser.set_defaults(run=_run, arguments=argv[end + 1 :])
  return cli.parse_command(parser, argv[:end])


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
  if options.arguments and options.runner == POOL:
    raise InputError(f'--runner={POOL} has no flags {options.arguments}')
  data = cli.said_options(DataOptions, options.config, overrides, 'data')
  # A run that begins with another run's parameters has that run's tokenizer,
  # too.
  config = cli.config_of(options.config, overrides)
  begin: Any = config.get('init_from', {})
  if begin.get('workdir') and begin.get('keep_tokenizer', True):
    data = data.with_tokenizer_of(begin.get('workdir'))
  engine = Engine(options.processes, options.runner, tuple(options.arguments))
  start = time.perf_counter()
  reports = prepare(data, engine, console=Console())
  seconds = time.perf_counter() - start
  cli.say(_lines(data, reports, engine, seconds))


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  cli.run_command(*parse(argv))


if __name__ == '__main__':
  main()
