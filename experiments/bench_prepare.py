"""How fast is text made into tokens, and what do more processes add?

    python -m experiments.bench_prepare
    python -m experiments.bench_prepare --large_gb=5 --rounds=0

Lines of JSON, pieces of the standard library's text, are tokenized by 1, 2, ...
processes, as bytes and by a BPE of 8,192 tokens that is trained on them; where
they are installed, also by Apache Beam's FnApiRunner and by `datasets.map` of
Hugging Face, each with one process. The cases are interleaved; the start of the
processes is a part of their time. With `--large_gb` data of that size is
prepared once by the processes, by Beam, too, whose files have to be the same,
and then read at random by two processes, which compare documents with the
source. Writes `table.md`, `rows.csv` and `results.json` to
`results/bench_prepare/<device>`.
"""

import argparse
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

import numpy as np

from experiments.benchmarks import random_reads, timing
from experiments.benchmarks.random_reads import Corpus
from experiments.study.tables import markdown_table
from moe_jax import cli, data
from moe_jax.data import cache_folders
from moe_jax.data.pieces import Engine, make

NAME, BEAM = 'bench_prepare', 'FnApiRunner'
_BPE_TOKENS = 8192
_BPE_DOCUMENTS = 2000


def train_bpe(corpus: Corpus) -> data.TokenizerOptions:
  """A BPE that is trained on some documents."""
  texts = (corpus.document(-number) for number in range(1, _BPE_DOCUMENTS))
  trained = data.TrainedOptions('bpe', _BPE_TOKENS).fit(texts)
  return data.tokenizers.Fitted(trained)


def prepare_once(
  pattern: str,
  tokenizer: data.TokenizerOptions,
  folder: pathlib.Path,
  engine: Engine,
) -> pathlib.Path:
  """Tokenizes the files into an empty cache; returns the tokens' folder."""
  shutil.rmtree(folder / 'tokens', ignore_errors=True)
  options = options_of(pattern, tokenizer, folder)
  corpus = options.source.texts(options.selection)
  return make(corpus, tokenizer, options.selection, engine)


def map_once(
  pattern: str, tokenizer: data.TokenizerOptions, folder: pathlib.Path
) -> None:
  """Tokenizes the files by `datasets.map` into an empty cache."""
  import datasets

  shutil.rmtree(folder / 'datasets', ignore_errors=True)
  datasets.disable_progress_bars()
  lines = datasets.load_dataset(
    'json', data_files=pattern, split='train', cache_dir=f'{folder}/datasets'
  )
  fitted = tokenizer.fit(())
  lines.map(
    lambda batch: {'ids': fitted.encode_batch(batch['text'])},
    batched=True,
    remove_columns=lines.column_names,
  )


def engines(processes: Sequence[int]) -> dict[str, Engine]:
  """The engines that are installed, by name."""
  by_name = {f'pool of {n}': Engine(processes=n) for n in processes}
  if importlib.util.find_spec('apache_beam'):
    flags = ('--direct_num_workers=1',)
    by_name[BEAM] = Engine(runner=BEAM, arguments=flags)
  return by_name


def options_of(
  pattern: str, tokenizer: data.TokenizerOptions, folder: pathlib.Path
) -> data.DataOptions:
  """The data of a run on these files."""
  return data.DataOptions(
    source=data.FilesSource(pattern),
    tokenizer=tokenizer,
    seq_len=512,
    cache_dir=str(folder),
  )


def measure(
  folder: pathlib.Path, size: int, processes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
  """A row for each tokenizer and number of processes."""
  corpus = Corpus()
  corpus.write(folder / 'lines', size)
  total = sum(p.stat().st_size for p in (folder / 'lines').iterdir())
  kinds = {'bytes': data.BytesOptions(), 'BPE': train_bpe(corpus)}
  pattern, rows = f'{folder}/lines/*.jsonl', []
  by_name = engines(processes)
  for name, tokenizer in kinds.items():
    cases = {
      engine: functools.partial(
        prepare_once, pattern, tokenizer, folder, by_name[engine]
      )
      for engine in by_name
    }
    if importlib.util.find_spec('datasets'):
      case = functools.partial(map_once, pattern, tokenizer, folder)
      cases['datasets.map'] = case
    times = timing.interleave(cases, seconds=0, least=rounds, most=rounds)
    for engine, durations in times.items():
      speed = timing.Spread.of([total / t / 1e6 for t in durations])
      speed_up = timing.ratio(next(iter(times.values())), durations)
      n = by_name[engine].processes if engine in by_name else 1
      rows.append(
        {
          'tokenizer': name,
          'engine': engine,
          'processes': n,
          'megabytes': total / 1e6,
          'rounds': rounds,
          'mb_per_second': speed.median,
          'mb_per_second_low': speed.low,
          'mb_per_second_high': speed.high,
          'speed_up': speed_up.median,
          'speed_up_low': speed_up.low,
          'speed_up_high': speed_up.high,
          'load': os.getloadavg()[0],
        }
      )
  return rows


def large(folder: pathlib.Path, gigabytes: float, processes: int) -> dict:
  """Prepares much text once, and reads it at random; numbers by name."""
  corpus = Corpus()
  training = corpus.write(folder / 'large', int(gigabytes * 1e9))
  tokenizer = data.BytesOptions()
  begin = time.perf_counter()
  pattern = f'{folder}/large/*.jsonl'
  pool = Engine(processes=processes)
  tokens = prepare_once(pattern, tokenizer, folder / 'cache', pool)
  seconds = time.perf_counter() - begin
  read = _size(folder / 'large')
  options = options_of(pattern, tokenizer, folder / 'cache')
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
  if beam := engines(()).get(BEAM):
    begin = time.perf_counter()
    theirs = prepare_once(pattern, tokenizer, folder / 'beam', beam)
    facts['beam_seconds'] = time.perf_counter() - begin
    lists = [f / cache_folders.LIST for f in (tokens, theirs)]
    facts['same_bytes'] = lists[0].read_bytes() == lists[1].read_bytes()
    shutil.rmtree(folder / 'beam')
  print(f'prepared: {facts}', flush=True)
  for name, digests in (('first', True), ('unchecked', False)):
    case_options = dataclasses.replace(options, cache_digests=digests)
    facts[name] = random_reads.read_at_random(case_options, corpus, training)
  return facts


def _size(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob('*'))


def report(
  rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any] | None
) -> str:
  """The tables, in Markdown."""
  f = timing.facts()
  lines = [
    {
      'tokenizer': row['tokenizer'],
      'engine': row['engine'],
      'MB/s': _spread(row, 'mb_per_second', '.1f'),
      'MB/s a process': f'{row["mb_per_second"] / row["processes"]:.1f}',
      'speed-up': _spread(row, 'speed_up', '.2f'),
      'load': f'{row["load"]:.1f}',
    }
    for row in rows
  ]
  text = (
    f'# Text into tokens\n\n{f["device"]} ({f["cores"]} cores), {f["date"]}. '
  )
  if rows:
    text += (
      f'{rows[0]["megabytes"]:.0f} MB of JSON lines, {rows[0]["rounds"]} '
      'interleaved rounds: medians, and medians of ratios within a round '
      '(quartiles in brackets); the load is the mean number of processes that '
      f'wanted a core.\n\n{markdown_table(lines)}\n'
    )
  return text + (_large_text(run) if run else '')


def _spread(row: Mapping[str, Any], name: str, form: str) -> str:
  spread = timing.Spread(row[f'{name}_low'], row[name], row[f'{name}_high'])
  return format(spread, form)


def _large_text(run: Mapping[str, Any]) -> str:
  reads = [*run['first'], *run['unchecked']]
  rates = [f'{read["rows_per_second"]:,.0f}' for read in run['unchecked']]
  beam = ''
  if 'beam_seconds' in run:
    same = 'the same' if run['same_bytes'] else 'OTHER'
    beam = f' By {BEAM} in {run["beam_seconds"]:.0f} s: {same} bytes.'
  return (
    f'\n{run["gigabytes"]:.2f} GB, {run["documents"]:,} documents, by '
    f'{run["processes"]} processes in {run["seconds"]:.0f} s: '
    f'{run["mb_per_second"]:.1f} MB/s into {run["token_gigabytes"]:.1f} GB, '
    f'at most {run["peak_mib"]:.0f} MiB of memory in a process (load '
    f'{run["load"]:.1f}). Read at random by {len(run["unchecked"])} '
    f'processes: {" and ".join(rates)} rows of 512 tokens a second; opened in '
    f'{_most(run["first"], "open_seconds"):.1f} s where digests are checked, '
    f'in {_most(run["unchecked"], "open_seconds"):.1f} s where not; '
    f'{sum(read["checked"] for read in reads):,} documents were those of the '
    f'source, {sum(read["wrong"] for read in reads)} were not.{beam}\n'
  )


def _most(reads: Sequence[Mapping[str, Any]], name: str) -> float:
  return float(np.max([read[name] for read in reads]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(
    prog=f'python -m experiments.{NAME}', description=__doc__.split('\n')[0]
  )
  add, positive = parser.add_argument, cli.POSITIVE
  add('--mb', type=positive, default=200, help='size of the interleaved cases')
  add(
    '--processes',
    type=positive,
    default=2,
    help='largest number of processes',
  )
  add(
    '--rounds',
    type=cli.NOT_NEGATIVE,
    default=5,
    help='interleaved rounds; 0 leaves these cases out',
  )
  add(
    '--large_gb',
    type=cli.number(float, minimum=0),
    default=0.0,
    help='gigabytes that are prepared once; they take three times their size '
    'of the disk',
  )
  add('--folder', default='', help='folder of the data, which is removed again')
  add('--output', default='results', help='folder of the results')
  return parser.parse_args(argv)


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures all cases and writes the tables."""
  options = parse(argv)
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
