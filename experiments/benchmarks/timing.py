"""Interleaved timing: every case runs once in every round.

A machine's speed drifts by more than the differences that are measured. The
cases of one round meet the machine in the same state, so that ratios are taken
round by round, and their median is reported.
"""

import argparse
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from experiments.benchmarks import program_counts, roofline


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function with its arguments.

  Attributes:
    run: Calls the function and waits for its result.
    compile_seconds: Time of tracing, lowering and compiling.
    counts: XLA's own counts of the program's FLOPs and bytes.
  """

  run: Callable[[], Any]
  compile_seconds: float
  counts: program_counts.Counts


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
    low, middle, high = (
      format(value, spec) for value in (self.low, self.median, self.high)
    )
    return f'{middle} ({low}-{high})'


def compile_ahead(function: Callable[..., Any], *args: Any) -> 'Compilation':
  """Compiles the function for arguments of these shapes; none is donated."""
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  return Compilation(compiled, time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class Compilation:
  """A compiled function, and the seconds that compiling took."""

  compiled: Compiled
  seconds: float

  def on(self, *args: Any) -> Program:
    """The program that calls the function with these arguments."""
    return Program(
      run=lambda: jax.block_until_ready(self.compiled(*args)),
      compile_seconds=self.seconds,
      counts=program_counts.counts(self.compiled),
    )


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
    'roofline_ms': 1e3 * Spread.of(limits).median,
    'fraction': ratio(limits, times).median,
  }


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that all benchmarks have which measure peaks."""
  parser.add_argument(
    '--output', default='results', help='folder of the results'
  )
  parser.add_argument(
    '--rough_peaks',
    action='store_true',
    help="measure the machine's peaks on small arrays, for a trial",
  )


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


def write(
  output: str,
  name: str,
  text: str,
  rows: Sequence[Mapping[str, Any]],
  metadata: Mapping[str, Any],
) -> pathlib.Path:
  """Writes `table.md`, `rows.csv` and `results.json`; returns their folder.

  Args:
    output: The results' root; the folder is `<output>/<name>/<device>`.
    name: Name of the experiment.
    text: Content of `table.md`.
    rows: Numbers by column, a row for each measured case.
    metadata: Entries that the JSON holds beside the rows and `facts`.
  """
  folder = pathlib.Path(output) / name / folder_name(device_name())
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'table.md').write_text(text, encoding='utf-8')
  columns = list(dict.fromkeys(key for row in rows for key in row))
  with (folder / 'rows.csv').open('w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
  provenance = {**facts(), 'command': command_of(sys.argv)}
  results = {'facts': provenance, **metadata, 'rows': list(rows)}
  (folder / 'results.json').write_text(
    json.dumps(results, indent=2) + '\n', encoding='utf-8'
  )
  return folder
