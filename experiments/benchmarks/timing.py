"""Interleaved timing: every case runs once in every round.

A machine's speed drifts by more than the differences that are measured. The
cases of one round meet the machine in the same state, so that ratios are taken
round by round, and their median is reported.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import re
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled, Wrapped

from experiments.benchmarks import roofline
from experiments.study.tables import markdown_table
from moe_jax import cli
from moe_jax.devices import keep_freed_memory

Row = Mapping[str, Any]
Cell = str | Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that is timed.

  Attributes:
    run: Calls the program and waits for its result.
    work: The least work of a call.
    numbers: Further values of the program's row, by the name of the column.
  """

  run: Callable[[], Any]
  work: roofline.Work
  numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Spread:
  """Quartiles of one case's values over rounds."""

  low: float
  median: float
  high: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Spread':
    """The quartiles of values, one for each round."""
    return cls(*(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))))

  def __format__(self, spec: str) -> str:
    """The median and the quartiles as text, '1.12 (1.08-1.19)'."""
    return f'{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})'


def compiled(jitted: Wrapped, *args: Any) -> tuple[Compiled, dict[str, float]]:
  """Compiles a jitted function for arguments of these shapes.

  Returns:
    The compiled function, and numbers by name: the seconds of tracing, lowering
    and compiling, the bytes of the arguments, and those that are allocated
    while the program runs, besides arguments and results.
  """
  start = time.perf_counter()
  program = jitted.lower(*args).compile()
  seconds, memory = time.perf_counter() - start, program.memory_analysis()
  return program, {
    'compile_seconds': seconds,
    'argument_bytes': memory.argument_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
  }


def interleave(
  cases: Mapping[Any, Callable[[], Any]],
  *,
  seconds: float,
  least: int = 5,
  most: int = 50,
) -> dict[Any, list[float]]:
  """Times all cases in rounds; the seconds of each case in each round.

  A first round warms up and is not timed. The order rotates by one case each
  round, so that no case always follows the same other one.

  Args:
    cases: Functions by name; each returns once its result is ready.
    seconds: Time after which no further round begins.
    least: Smallest number of rounds, however long they take.
    most: Largest number of rounds, however short they are.
  """
  names = list(cases)
  for run in cases.values():
    run()
  times: dict[Any, list[float]] = {name: [] for name in names}
  begin = time.perf_counter()
  for i in range(most):
    turn = i % len(names)
    for name in names[turn:] + names[:turn]:
      start = time.perf_counter()
      cases[name]()
      times[name].append(time.perf_counter() - start)
    if i + 1 >= least and time.perf_counter() - begin > seconds:
      break
  return times


def ratio(a: Sequence[float], b: Sequence[float]) -> Spread:
  """Quartiles of the ratio of a to b, taken round by round."""
  return Spread.of([x / y for x, y in zip(a, b, strict=True)])


def with_probes(
  cases: Mapping[Any, Callable[[], Any]], peaks: roofline.Peaks, **options: Any
) -> tuple[dict[Any, list[float]], list[roofline.Peaks]]:
  """Times the cases and the machine's peaks in the same rounds.

  Args:
    cases: Functions by name.
    peaks: Peaks measured before, whose probes run again in every round.
    **options: Arguments of `interleave`.

  Returns:
    The seconds of each case in each round, and the peaks of each round.
  """

  def waiting(run):
    return lambda: jax.block_until_ready(run())

  probes = {name: waiting(run) for name, run in roofline.probes(peaks).items()}
  times = interleave({**cases, **probes}, **options)
  peaks_by_round = roofline.by_round(peaks, times)
  return {name: times[name] for name in cases}, peaks_by_round


def measure(
  programs: Mapping[Any, Program],
  peaks: roofline.Peaks,
  others: Mapping[Any, Callable[[], Any]] = types.MappingProxyType({}),
  **options: Any,
) -> tuple[dict[Any, list[float]], dict[Any, dict[str, Any]]]:
  """Times programs, and gives a row of a table for each of them.

  Args:
    programs: Programs by name.
    peaks: Peaks of the machine, which are measured again in every round.
    others: Functions that are called in every round and have no row.
    **options: Arguments of `interleave`.

  Returns:
    The seconds of each program in each round, and the rows of the programs:
    time, least work, the least time of that work at the peaks, its fraction of
    the time, and the program's own numbers.
  """
  runs = {name: program.run for name, program in programs.items()}
  times, rounds = with_probes({**runs, **others}, peaks, **options)
  rows = {}
  for name, program in programs.items():
    limits = [program.work.seconds(of_round) for of_round in rounds]
    rows[name] = {
      'case': name,
      'rounds': len(rounds),
      'ms': milliseconds(times[name]),
      **dataclasses.asdict(program.work),
      'roofline_ms': milliseconds(limits).median,
      'fraction': ratio(limits, times[name]).median,
      **program.numbers,
    }
  return times, rows


def milliseconds(times: Sequence[float]) -> Spread:
  """Quartiles of seconds, one for each round, in milliseconds."""
  return Spread.of([1e3 * seconds for seconds in times])


def device_name() -> str:
  """Name of the device: a CPU's model, or an accelerator's kind."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  cpus = pathlib.Path('/proc/cpuinfo')
  text = cpus.read_text(encoding='utf-8') if cpus.exists() else ''
  names = re.findall(r'^model name\s*: (.*\S)', text, re.MULTILINE)
  return [*names, platform.processor() or platform.machine()][0]


def folder_name(device: str) -> str:
  """A device's name as that of a folder: 'AMD EPYC 9B14' -> 'amd_epyc_9b14'."""
  return re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')


def facts() -> dict[str, str]:
  """The device, the date and the versions of a measurement."""
  return {
    'device': device_name(),
    'devices': f'{jax.device_count()} x {jax.devices()[0].platform}',
    'cores': str(os.cpu_count()),
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


def machine() -> str:
  """A sentence on the machine and the date."""
  f = facts()
  return f'{f["device"]} ({f["cores"]} cores), {f["date"]}.'


def command_of(argv: Sequence[str]) -> list[str]:
  """The words of a command that measures the same on any machine.

  Args:
    argv: The program's path and its arguments. Its module stands in place of
      the path, and `--output`, the folder of the results, is left out.
  """
  words = ['python', '-m', f'experiments.{pathlib.Path(argv[0]).stem}']
  rest = iter(argv[1:])
  for word in rest:
    if word == '--output':
      next(rest, None)
    elif not word.startswith('--output='):
      words.append(word)
  return words


def parser(name: str, text: str | None, *, peaks: bool = True) -> cli.Parser:
  """The parser of a benchmark's command, with the flags that all of them have.

  Args:
    name: Name of the benchmark's module.
    text: Docstring of the module.
    peaks: Whether the benchmark measures the machine's peaks.
  """
  parser = cli.parser(f'experiments.{name}', text)
  add = parser.add_argument
  add('--output', default='results', help='folder of the results')
  if peaks:
    text = "measure the machine's peaks on small arrays, for a trial"
    add('--rough_peaks', action='store_true', help=text)
  return parser


def measured_peaks(
  options: argparse.Namespace, dtype: str = 'float32'
) -> roofline.Peaks:
  """Measures and prints the machine's peaks, before anything else is timed.

  From then on the process keeps memory that it frees, as training does.

  Args:
    options: The command line of a parser that `parser` has made.
    dtype: Type of the operands of products.
  """
  keep_freed_memory()
  peaks = roofline.measure_peaks(dtype, quick=options.rough_peaks)
  print(f'{device_name()}; {peaks.describe()}', flush=True)
  return peaks


def conditions(peaks: roofline.Peaks | None = None) -> str:
  """Sentences on the machine and the date, and on how all cases were timed."""
  f = facts()
  measured = f'; {peaks.describe()}' if peaks else ''
  return (
    f'{f["device"]} ({f["devices"]}, {f["cores"]} cores), {f["date"]}, jax '
    f'{f["jax"]}{measured}. Cases ran interleaved: medians, and medians of '
    'ratios within a round (quartiles in brackets).'
  )


def table(rows: Sequence[Row], columns: Mapping[str, Cell]) -> str:
  """A table in Markdown, with a line for each row.

  Args:
    rows: Values by name, a row for each measured case.
    columns: The format of a cell's text, or a function that gives it, by the
      column's title. A format names values of the row, '{ms:.1f}'; the cell is
      empty where the row lacks one.
  """
  return markdown_table(
    [{title: _cell(row, x) for title, x in columns.items()} for row in rows]
  )


def _cell(row: Row, cell: Cell) -> str:
  try:
    return cell.format_map(row) if isinstance(cell, str) else cell(row)
  except KeyError:
    return ''


# Columns on the work of a case, of rows that `measure` gives.
WORK: Mapping[str, Cell] = {
  'roofline ms': '{roofline_ms:.1f}',
  'reached': '{fraction:.0%}',
  'GFLOP': lambda row: f'{row["flops"] / 1e9:.1f}',
  'MB at least': lambda row: f'{row["min_bytes"] / 1e6:,.0f}',
  'temporary MiB': lambda row: f'{row["temp_bytes"] / 2**20:,.1f}',
  'compile s': '{compile_seconds:.1f}',
}


ABOUT_WORK = (
  'Reached is roofline / measured. Roofline: the larger of GFLOP / peak matmul '
  'and MB at least / peak copy, both peaks timed again in every round, as the '
  'machine drifts; GFLOP and MB at least are by formula'
)


def flat(row: Row) -> dict[str, Any]:
  """The row with three columns, a median and quartiles, for each spread."""
  columns = {}
  for name, value in row.items():
    if isinstance(value, Spread):
      columns |= {f'{name}_low': value.low, f'{name}_high': value.high}
      value = value.median
    columns[name] = value
  return columns


def write(
  output: str,
  name: str,
  text: str,
  rows: Sequence[Row],
  metadata: Mapping[str, Any],
) -> None:
  """Writes `table.md` and `results.json`, and prints the text.

  Args:
    output: The results' root; the folder is `<output>/<name>/<device>`.
    name: Name of the experiment.
    text: Content of `table.md`.
    rows: Numbers and spreads by column, a row for each measured case.
    metadata: Entries that the JSON holds beside the rows and `facts`.
  """
  folder = pathlib.Path(output) / name / folder_name(device_name())
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'table.md').write_text(text, encoding='utf-8')
  results = {
    'facts': {**facts(), 'command': command_of(sys.argv)},
    **metadata,
    'rows': [flat(row) for row in rows],
  }
  content = json.dumps(results, indent=2) + '\n'
  (folder / 'results.json').write_text(content, encoding='utf-8')
  print(f'\n{text}\nwritten: {folder}')
