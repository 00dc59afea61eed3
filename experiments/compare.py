"""Compares runs: configs, last metrics, and seeds in pairs.

    python -m experiments.compare runs/switch runs/dense
    python -m experiments.compare results/eval_capacity/runs/*/seed*

Runs whose configs differ in nothing but the seed are a group, with a letter.
Where another group has runs of the seeds of the first, their last metrics are
compared in pairs.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.study.tables import markdown_table
from moe_jax import cli
from moe_jax.analysis.intervals import Interval
from moe_jax.config import flatten
from moe_jax.errors import InputError
from moe_jax.runs import metrics, workdir

# The folders of a study's runs are named after the seed; see `jobs.jobs_of`.
_OF_SEED = re.compile(r'seed\d+-[0-9a-f]{10}')
SPEED = 'train/tokens_per_second'
_COMPARED = re.compile(rf'train/(loss|drop_rate)|{SPEED}|eval/[^/]+/[^/]+')


class ComparedRun(NamedTuple):
  """A run that is compared: its config without the seed, and last metrics.

  The speed is the median of all rows.
  """

  folder: pathlib.Path
  seed: int
  config: Mapping[str, str]
  last: Mapping[str, float]


Groups = Mapping[str, Sequence[ComparedRun]]


def read(folder: pathlib.Path) -> ComparedRun:
  """Reads a run's folder.

  Raises:
    ValueError: It holds no run, or has no metrics.
  """
  if not (folder / workdir.CONFIG).exists():
    raise InputError(f'{folder} holds no run: it has no {workdir.CONFIG}')
  path = folder / metrics.FILE_NAME
  rows = metrics.read_metrics(path) if path.exists() else []
  if not rows:
    raise InputError(
      f'{folder} has no metrics: {metrics.FILE_NAME} has no row, so it has not '
      'been trained yet'
    )
  config = workdir.kept_config(folder)
  last = {
    key: value
    for row in rows
    for key, value in row.items()
    if _COMPARED.fullmatch(key) and isinstance(value, int | float)
  }
  if SPEED in last:
    speeds = [row[SPEED] for row in rows if SPEED in row]
    last[SPEED] = float(np.median(speeds))
  return ComparedRun(folder, config.get('seed', 0), _texts(config), last)


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
  """The values of a config without its seed, by dotted name."""
  values = flatten(config)
  values.pop('seed', None)
  return {key: _text(value) for key, value in values.items()}


def _text(value: Any) -> str:
  """A value as text; a run's folder without its seed, with its own config."""
  text, num_seeds = _OF_SEED.subn('seed*', str(value))
  folder = pathlib.Path(str(value))
  if num_seeds and (folder / workdir.CONFIG).exists():
    config = _texts(workdir.kept_config(folder))
    content = json.dumps(config, sort_keys=True).encode()
    text += f', config {hashlib.sha256(content).hexdigest()[:10]}'
  return text


def grouped(runs: Sequence[ComparedRun]) -> Groups:
  """The runs of each config by a letter; each seed of a group has one run.

  Raises:
    ValueError: A folder is given twice, or tokenizers differ, so that losses
      are of other tokens.
  """
  folders = [str(run.folder) for run in runs]
  if repeated := {folder for folder in folders if folders.count(folder) > 1}:
    raise InputError(f'runs are given twice: {sorted(repeated)}')
  first, *others = [_tokenizer(run) for run in runs]
  for run, other in zip(runs[1:], others, strict=True):
    if first != other:
      raise InputError(
        f'runs with different tokenizers cannot be compared: {runs[0].folder} '
        f'has {first:.60}, and {run.folder} has {other:.60}'
      )
  groups: dict[tuple[str, int], list[ComparedRun]] = {}
  for run in runs:
    config, repeat = json.dumps(run.config, sort_keys=True), 0
    while run.seed in {one.seed for one in groups.get((config, repeat), [])}:
      repeat += 1
    groups.setdefault((config, repeat), []).append(run)
  letters = (chr(ord('A') + i % 26) + str(i // 26 or '') for i in range(10**6))
  return dict(zip(letters, groups.values()))


def _tokenizer(run: ComparedRun) -> str:
  path = run.folder / workdir.TOKENIZER
  return path.read_text(encoding='utf-8').strip() if path.exists() else 'none'


def tables(groups: Groups) -> Iterator[list[dict[str, str]]]:
  """The rows of each table: runs, configs, last metrics, paired differences."""
  yield [
    {'group': letter, 'run': str(run.folder), 'seed': str(run.seed)}
    for letter, group in groups.items()
    for run in group
  ]
  configs = {letter: group[0].config for letter, group in groups.items()}
  keys = sorted({key for config in configs.values() for key in config})
  values = {k: {x: c.get(k, '-') for x, c in configs.items()} for k in keys}
  yield [{'key': k, **v} for k, v in values.items() if len({*v.values()}) > 1]
  # The last values of a metric by the run's seed, of each group.
  last: dict[str, dict[str, dict[int, float]]] = {}
  for letter, group in groups.items():
    for run in group:
      for name, value in run.last.items():
        last.setdefault(name, {x: {} for x in groups})[letter][run.seed] = value
  yield [
    {'last value': name, **{x: _number([*v.values()]) for x, v in by.items()}}
    for name, by in last.items()
  ]
  yield list(_paired(last))


def _paired(
  last: Mapping[str, Mapping[str, Mapping[int, float]]],
) -> Iterator[dict[str, str]]:
  """Differences of each group to the first, of runs of equal seeds.

  Args:
    last: Last values by name of the metric, letter of the group, and seed.
  """
  for name, by_group in last.items():
    (first, base), *others = by_group.items()
    for letter, values in others:
      differences = [x - base[s] for s, x in values.items() if s in base]
      if differences:
        sign = Interval.of(differences).sign()
        yield {
          'groups': f'{letter} minus {first}',
          'metric': name,
          'seeds': str(len(differences)),
          'difference': _number(differences, '+'),
          'so': {-1: 'lower', 0: 'not told apart', 1: 'higher'}[sign],
        }


def _number(values: Sequence[float], sign: str = '') -> str:
  """A value, or the mean of values with its 95 % interval (Student)."""
  if len(values) < 2:
    return f'{values[0]:{sign},.4f}' if values else '-'
  return f'{Interval.of(values):{sign},.4f}'


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Prints a comparison."""
  parser = cli.parser('experiments.compare', __doc__)
  parser.add_argument('runs', metavar='RUN', nargs='+', help='folder of a run')
  options = parser.parse_args(argv)
  logging.set_verbosity(logging.WARNING)
  if len(options.runs) < 2:
    parser.error(f'one run is given, {options.runs[0]}; give at least two')
  groups = grouped([read(pathlib.Path(run)) for run in options.runs])
  print('\n'.join(markdown_table(rows) for rows in tables(groups) if rows))


if __name__ == '__main__':
  main()
