"""How fast is text made into tokens, and what do more processes add?

    python -m experiments.bench_prepare
    python -m experiments.bench_prepare --large_gb=5 --rounds=0

Lines of JSON, pieces of the standard library's text, are tokenized by 1, 2, ...
processes, as bytes and by a BPE of 8,192 tokens that is trained on them; where
they are installed, also by Apache Beam's FnApiRunner and by `datasets.map` of
Hugging Face, each with one process. The cases are interleaved; the start of the
processes is a part of their time. With `--large_gb` data of that size is
prepared once by the processes, and then read at random by two, which compare
documents with the source. Writes `table.md` and `results.json` to
`results/bench_prepare/<device>`.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks import random_reads, timing
from experiments.benchmarks.timing import Row
from moe_jax import cli, data
from moe_jax.data.pieces import Engine, make

NAME = 'bench_prepare'
_BPE_TOKENS = 8192
_BPE_DOCUMENTS = 2000


def prepare_once(options: data.DataOptions, engine: Engine) -> pathlib.Path:
  """Tokenizes a run's files into an empty cache; returns the tokens' folder."""
  shutil.rmtree(f'{options.cache_dir}/tokens', ignore_errors=True)
  corpus = options.source.texts(options.selection)
  return make(corpus, options.tokenizer, options.selection, engine)


def map_once(options: data.DataOptions) -> None:
  """Tokenizes a run's files by `datasets.map` into an empty cache."""
  import datasets

  cache = f'{options.cache_dir}/datasets'
  shutil.rmtree(cache, ignore_errors=True)
  datasets.disable_progress_bars()
  files = options.source.pattern
  where = {'data_files': files, 'cache_dir': cache}
  lines = datasets.load_dataset('json', split='train', **where)
  fitted = options.tokenizer.fit(())
  lines.map(
    lambda batch: {'ids': fitted.encode_batch(batch['text'])},
    batched=True,
    remove_columns=lines.column_names,
  )


def options_of(
  lines: pathlib.Path, tokenizer: data.TokenizerOptions, cache: pathlib.Path
) -> data.DataOptions:
  """The data of a run on the files of a folder."""
  source = data.FilesSource(f'{lines}/*.jsonl')
  sizes = dict(seq_len=512, cache_dir=str(cache))
  return data.DataOptions(source=source, tokenizer=tokenizer, **sizes)


def measure(
  folder: pathlib.Path, size: int, processes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
  """A row for each tokenizer and number of processes."""
  lines = folder / 'lines'
  random_reads.write(lines, size)
  total = _size(lines)
  texts = (random_reads.document(-n) for n in range(1, _BPE_DOCUMENTS))
  bpe = data.TrainedOptions('bpe', _BPE_TOKENS).fit(texts)
  kinds = {'bytes': data.BytesOptions(), 'BPE': data.tokenizers.Fitted(bpe)}
  engines = {f'pool of {n}': Engine(processes=n) for n in processes}
  if importlib.util.find_spec('apache_beam'):
    flags = ('--direct_num_workers=1',)
    engines['FnApiRunner'] = Engine(runner='FnApiRunner', arguments=flags)
  rows = []
  for name, tokenizer in kinds.items():
    options = options_of(lines, tokenizer, folder)
    cases = {
      name: functools.partial(prepare_once, options, engine)
      for name, engine in engines.items()
    }
    if importlib.util.find_spec('datasets'):
      cases['datasets.map'] = functools.partial(map_once, options)
    times = timing.interleave(cases, seconds=0, least=rounds, most=rounds)
    first = next(iter(times.values()))
    rows += [
      {
        'tokenizer': name,
        'engine': engine,
        'processes': engines[engine].processes if engine in engines else 1,
        'megabytes': total / 1e6,
        'rounds': rounds,
        'mb_per_second': timing.Spread.of([total / t / 1e6 for t in durations]),
        'speed_up': timing.ratio(first, durations),
        'load': os.getloadavg()[0],
      }
      for engine, durations in times.items()
    ]
  return rows


def large(folder: pathlib.Path, gigabytes: float, processes: int) -> dict:
  """Prepares much text once, and reads it at random; numbers by name."""
  lines = folder / 'large'
  training = random_reads.write(lines, int(gigabytes * 1e9))
  options = options_of(lines, data.BytesOptions(), folder / 'cache')
  begin = time.perf_counter()
  tokens = prepare_once(options, Engine(processes=processes))
  seconds, read = time.perf_counter() - begin, _size(lines)
  facts = {
    'gigabytes': read / 1e9,
    'documents': len(training),
    'token_gigabytes': _size(tokens) / 1e9,
    'processes': processes,
    'seconds': seconds,
    'mb_per_second': read / seconds / 1e6,
    'peak_mib': random_reads.peak_memory() / 2**20,
    'load': os.getloadavg()[0],
  }
  print(f'prepared: {facts}', flush=True)
  for name, digests in (('first', True), ('unchecked', False)):
    case_options = dataclasses.replace(options, cache_digests=digests)
    facts[name] = random_reads.read_at_random(case_options, training)
  return facts


def _size(folder: pathlib.Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())


COLUMNS = {
  'tokenizer': '{tokenizer}',
  'engine': '{engine}',
  'MB/s': '{mb_per_second:.1f}',
  'MB/s a process': lambda row: (
    f'{row["mb_per_second"].median / row["processes"]:.1f}'
  ),
  'speed-up': '{speed_up:.2f}',
  'load': '{load:.1f}',
}


def report(rows: Sequence[Row], run: Row | None) -> str:
  """The tables, in Markdown."""
  text = f'# Text into tokens\n\n{timing.machine()} '
  if rows:
    text += (
      f'{rows[0]["megabytes"]:.0f} MB of JSON lines, {rows[0]["rounds"]} '
      'interleaved rounds: medians, and medians of ratios within a round '
      '(quartiles in brackets); the load is the mean number of processes that '
      f'wanted a core.\n\n{timing.table(rows, COLUMNS)}\n'
    )
  return text + (_large_text(run) if run else '')


def _large_text(run: Mapping[str, Any]) -> str:
  first, unchecked = run['first'], run['unchecked']
  rates = [f'{read["rows_per_second"]:,.0f}' for read in unchecked]
  opened, at_once = (
    max(read['open_seconds'] for read in reads) for reads in (first, unchecked)
  )
  reads, names = [*first, *unchecked], ('checked', 'wrong')
  right, wrong = (sum(read[name] for read in reads) for name in names)
  return (
    f'\n{run["gigabytes"]:.2f} GB, {run["documents"]:,} documents, by '
    f'{run["processes"]} processes in {run["seconds"]:.0f} s: '
    f'{run["mb_per_second"]:.1f} MB/s into {run["token_gigabytes"]:.1f} GB, '
    f'at most {run["peak_mib"]:.0f} MiB of memory in a process (load '
    f'{run["load"]:.1f}). Read at random by {len(unchecked)} processes: '
    f'{" and ".join(rates)} rows of 512 tokens a second; opened in '
    f'{opened:.1f} s where digests are checked, in {at_once:.1f} s where not; '
    f'{right:,} documents were those of the source, {wrong} were not.\n'
  )


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures all cases and writes the tables."""
  parser = timing.parser(NAME, __doc__, peaks=False)
  add, positive = parser.add_argument, cli.POSITIVE
  add('--mb', type=positive, default=200, help='size of the interleaved cases')
  text = 'largest number of processes'
  add('--processes', type=positive, default=2, help=text)
  text = 'interleaved rounds; 0 leaves these cases out'
  add('--rounds', type=cli.NOT_NEGATIVE, default=5, help=text)
  at_least_0 = cli.number(float, minimum=0)
  text = 'gigabytes that are prepared once; they take three times their size'
  add('--large_gb', type=at_least_0, default=0.0, help=f'{text} of the disk')
  add('--folder', default='', help='folder of the data, which is removed again')
  options = parser.parse_args(argv)
  rows, large_run = [], None
  with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
    folder = pathlib.Path(name)
    if options.rounds:
      processes = range(1, options.processes + 1)
      size = options.mb * 10**6
      rows = measure(folder, size, processes, options.rounds)
    if options.large_gb:
      large_run = large(folder, options.large_gb, options.processes)
  text = report(rows, large_run)
  timing.write(options.output, NAME, text, rows, {'large': large_run})


if __name__ == '__main__':
  main()
