"""Interleaved timing: every case runs once in every round.

A machine's speed drifts by more than the differences that are measured. The
cases of one round meet the machine in the same state, so that ratios are taken
round by round, and their median is reported.
"""

import csv
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
from matplotlib.figure import Figure

from experiments.benchmarks import program_counts, roofline
from experiments.study.tables import markdown_table
from moe_jax import cli

Row = Mapping[str, Any]
Cell = str | Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function with its arguments.

  Attributes:
    run: Calls the function and waits for its result.
    numbers: Columns of a row: the time of tracing, lowering and compiling, and
      XLA's own counts; see `program_counts.counts`.
  """

  run: Callable[[], Any]
  numbers: Mapping[str, float]


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

  def __truediv__(self, number: float) -> 'Spread':
    """The quartiles of all values divided by a number."""
    return Spread(self.low / number, self.median / number, self.high / number)

  def __format__(self, spec: str) -> str:
    """The median and the quartiles as text, '1.12 (1.08-1.19)'."""
    low, middle, high = (
      format(value, spec) for value in (self.low, self.median, self.high)
    )
    return f'{middle} ({low}-{high})'


def compile_ahead(
  function: Callable[..., Any], *args: Any
) -> Callable[..., Program]:
  """Compiles the function for arguments of these shapes; none is donated.

  Returns:
    A function of such arguments that gives the program that is called on them.
  """
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  numbers = {
    'compile_seconds': time.perf_counter() - start,
    **program_counts.counts(compiled),
  }

  def on(*args: Any) -> Program:
    return Program(lambda: jax.block_until_ready(compiled(*args)), numbers)

  return on


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


def reached(
  times: Sequence[float], work: roofline.Work, peaks: Sequence[roofline.Peaks]
) -> dict[str, float]:
  """The work of a case, its roofline, and the fraction of it reached.

  Args:
    times: Seconds of the case in each round.
    work: Least work of the case.
    peaks: Peaks of the machine in each round.
  """
  limits = [work.seconds(p) for p in peaks]
  return {
    'flops': work.flops,
    'min_bytes': work.min_bytes,
    'roofline_ms': milliseconds(limits).median,
    'fraction': ratio(limits, times).median,
  }


def milliseconds(times: Sequence[float]) -> Spread:
  """Quartiles of seconds, one for each round, in milliseconds."""
  return Spread.of([1e3 * seconds for seconds in times])


def device_name() -> str:
  """Name of the device: a CPU's model, or an accelerator's kind."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      model_line = re.search(
        r'^model name\s*: (.+)$', file.read(), re.MULTILINE
      )
  except OSError:
    model_line = None
  name = model_line[1].strip() if model_line else ''
  return name or platform.processor() or platform.machine()


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


def _of_xla(name: str, unit: float, spec: str) -> Cell:
  """A cell of XLA's count, with a star where a program has a dynamic loop."""

  def cell(row: Row) -> str:
    loops = any(
      word in row['case'] for word in ('sorted', 'dropless', 'grouped')
    )
    return f'{row[name] / unit:{spec}}{" *" if loops else ""}'

  return cell


# Columns on the work of a case, of rows that have what `reached` and
# `Program.numbers` give.
WORK: Mapping[str, Cell] = {
  'roofline ms': '{roofline_ms:.1f}',
  'reached': '{fraction:.0%}',
  'GFLOP': lambda row: f'{row["flops"] / 1e9:.1f}',
  'GFLOP (XLA)': _of_xla('xla_flops', 1e9, '.1f'),
  'MB at least': lambda row: f'{row["min_bytes"] / 1e6:,.0f}',
  'MB (XLA)': _of_xla('xla_bytes', 1e6, ',.0f'),
  'temporary MiB': lambda row: f'{row["temp_bytes"] / 2**20:,.1f}',
  'compile s': '{compile_seconds:.1f}',
}


ABOUT_WORK = (
  '* XLA counts a loop of dynamic trip count once, so that its own figures are '
  "not the program's work there. Reached is roofline / measured. Roofline: the "
  'larger of GFLOP / peak matmul and MB at least / peak copy, both peaks timed '
  'again in every round, as the machine drifts; GFLOP and MB at least are by '
  'formula'
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


def draw_bars(
  path: pathlib.Path,
  ratios: Mapping[str, Spread],
  axis: str,
  limits: Mapping[str, float] = types.MappingProxyType({}),
) -> None:
  """Draws the ratio of each case as a bar, with quartiles.

  Args:
    path: File of the picture.
    ratios: Ratios by label of the bar, in the order of the bars.
    axis: Label of the axis.
    limits: Ratio of the fastest bare products, which is drawn as a black mark,
      by label of the bar.
  """
  figure = Figure(figsize=(7.5, 1 + 0.3 * len(ratios)), layout='constrained')
  axes, spreads = figure.subplots(), ratios.values()
  below = [spread.median - spread.low for spread in spreads]
  above = [spread.high - spread.median for spread in spreads]
  medians = [spread.median for spread in spreads]
  axes.barh([*ratios], medians, xerr=[below, above])
  if limits:
    style = dict(markersize=12, label='fastest bare products')
    axes.plot([*limits.values()], [*limits], 'k|', **style)
    axes.legend(frameon=False)
  axes.axvline(1, color='0.5', linewidth=0.8)
  axes.invert_yaxis()
  axes.set_xlabel(axis)
  axes.set_title(device_name(), loc='left')
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)


def write(
  output: str,
  name: str,
  text: str,
  rows: Sequence[Row],
  metadata: Mapping[str, Any],
) -> pathlib.Path:
  """Writes `table.md`, `rows.csv` and `results.json`, and prints the text.

  Args:
    output: The results' root; the folder is `<output>/<name>/<device>`.
    name: Name of the experiment.
    text: Content of `table.md`.
    rows: Numbers and spreads by column, a row for each measured case.
    metadata: Entries that the JSON holds beside the rows and `facts`.

  Returns:
    The folder of the files.
  """
  folder = pathlib.Path(output) / name / folder_name(device_name())
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'table.md').write_text(text, encoding='utf-8')
  lines = [flat(row) for row in rows]
  columns = list(dict.fromkeys(key for line in lines for key in line))
  with (folder / 'rows.csv').open('w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(lines)
  provenance = {**facts(), 'command': command_of(sys.argv)}
  results = {'facts': provenance, **metadata, 'rows': lines}
  (folder / 'results.json').write_text(
    json.dumps(results, indent=2) + '\n', encoding='utf-8'
  )
  print(f'\n{text}\nwritten: {folder}')
  return folder
