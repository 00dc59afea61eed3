"""Groups of runs side by side: tables, and curves over each other.

Not here: the runs (`compared_runs.py`), and the command and its page
(`experiments/compare.py`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.study.compared_runs import SPEED, Compared, Groups, config_of
from experiments.study.tables import Interval
from moe_jax.analysis import plot_style, plots, run_sections
from moe_jax.analysis.text_tables import ValueTable

_LOSS = r'train/loss|eval/[^/]+/loss'
_QUARTERS = (0.25, 0.5, 0.75, 1.0)


def tables(groups: Groups) -> list[ValueTable]:
  """The tables of a comparison, without those that would be empty."""
  candidates = [
    _runs(groups),
    _configs(groups),
    _metrics(groups),
    _losses(groups),
    _paired(groups),
    *_routing(groups),
  ]
  return [table for table in candidates if table.rows]


def _texts(name, title, note, columns, rows, num_left=1) -> ValueTable:
  """A table of texts, whose first `num_left` columns are aligned left."""
  forms = {key: '>' * (i >= num_left) for i, key in enumerate(columns)}
  return ValueTable(name, title, note, forms, rows)


def _runs(groups: Groups) -> ValueTable:
  rows = [
    [letter, str(one.run.folder), str(one.seed), run_sections.state(one.run)]
    for letter, group in groups.items()
    for one in group
  ]
  ends = {one.run.step for group in groups.values() for one in group}
  note = 'Runs of one letter differ in nothing but their seed.'
  if len(ends) > 1:
    note += ' Runs end at different steps: last values are of those.'
  columns = ['group', 'run', 'seed', 'state']
  return _texts('runs', 'Runs', note, columns, rows, num_left=4)


def _configs(groups: Groups) -> ValueTable:
  configs = [config_of(group[0].run) for group in groups.values()]
  keys = sorted({key for config in configs for key in config})
  rows = [
    [key, *values]
    for key in keys
    if len(set(values := [config.get(key, '-') for config in configs])) > 1
  ]
  title = 'Differences of the configs'
  columns = ['key', *groups]
  return _texts('configs', title, '', columns, rows, num_left=len(columns))


def _number(key: str, values: Sequence[float], sign: str = '') -> str:
  form = f'{sign},.0f' if key == SPEED else f'{sign},.4f'
  if len(values) == 1:
    return f'{values[0]:{form}}'
  return f'{Interval.of(values):{form}}' if values else '-'


def _metrics(groups: Groups) -> ValueTable:
  keys = dict.fromkeys(
    key for group in groups.values() for one in group for key in one.last
  )
  rows = [
    [
      key,
      *(
        _number(key, [one.last[key] for one in group if key in one.last])
        for group in groups.values()
      ),
    ]
    for key in keys
  ]
  note = 'Means over seeds, ± 95 % intervals (Student); speeds are medians.'
  title = 'Last values of the metrics'
  return _texts('metrics', title, note, ['metric', *groups], rows)


def _losses(groups: Groups) -> ValueTable:
  """Losses at quarters of the shortest run: the curves, as text."""
  shortest = min(one.run.step for group in groups.values() for one in group)
  rows = []
  for key in _loss_keys(groups):
    for step in dict.fromkeys(max(1, int(q * shortest)) for q in _QUARTERS):
      cells = [
        _number(key, [v for one in group for v in _until(one, key, step)])
        for group in groups.values()
      ]
      if set(cells) != {'-'}:
        rows.append([key, f'{step:,}', *cells])
  note = 'The last value that was logged until the step.'
  columns = ['loss', 'step', *groups]
  return _texts('losses', 'Losses over steps', note, columns, rows)


def _until(member: Compared, key: str, step: int) -> Sequence[float]:
  """The last value until a step, or nothing."""
  steps, values = _curve(member, key)
  return values[steps <= step][-1:].tolist()


def _curve(member: Compared, key: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps at which a run has a metric, and its values."""
  rows = [(row['step'], row[key]) for row in member.run.rows if key in row]
  pairs = np.array(rows, np.float64).reshape(-1, 2)
  return pairs[:, 0], pairs[:, 1]


def _loss_keys(groups: Groups) -> list[str]:
  keys = [key for group in groups.values() for one in group for key in one.last]
  return [key for key in dict.fromkeys(keys) if re.fullmatch(_LOSS, key)]


def _paired(groups: Groups) -> ValueTable:
  """Differences of each group to the first, of runs of equal seeds."""
  (first, base), *other_groups = groups.items()
  base_of = {one.seed: one.last for one in base}
  rows = []
  for letter, group in other_groups:
    pairs = [
      (one.last, base_of[one.seed]) for one in group if one.seed in base_of
    ]
    for key in _metrics_of_all(pairs):
      differences = [
        values[key] - base_values[key] for values, base_values in pairs
      ]
      words = {-1: 'lower', 0: 'not told apart', 1: 'higher'}
      sign = Interval.of(differences).sign()
      number = _number(key, differences, '+')
      rows.append(
        [f'{letter} minus {first}', key, str(len(pairs)), number, words[sign]]
      )
  note = (
    'Last values of runs of equal seeds; with a single one there is no '
    'interval. "Lower" and "higher" are said where the 95 % interval excludes '
    'zero.'
  )
  columns = ['groups', 'metric', 'seeds', 'difference', 'so']
  return _texts('paired', 'Paired differences', note, columns, rows, num_left=2)


def _metrics_of_all(pairs: Sequence[tuple[Mapping, Mapping]]) -> Iterator[str]:
  """The metrics that both runs of all pairs have, as finite numbers."""
  values = [last for pair in pairs for last in pair]
  for key in values[0] if values else ():
    if all(key in last and math.isfinite(last[key]) for last in values):
      yield key


def _routing(groups: Groups) -> Iterator[ValueTable]:
  """Routing reports, layer by layer, with the runs of a layer together."""
  reports: dict[str, list[tuple[str, ValueTable]]] = {}
  for letter, group in groups.items():
    for one in group:
      seed_text = f', seed {one.seed}' * (len(group) > 1)
      for table in run_sections.routing(one.run.folder)[0]:
        reports.setdefault(table.name, []).append((letter + seed_text, table))
  for labelled in reports.values():
    table = labelled[0][1]
    rows = [[label, *row] for label, one in labelled for row in one.rows]
    layer = list(table.columns).index('layer') + 1
    rows.sort(key=lambda row: int(row[layer]))
    columns = {'run': '', **table.columns}
    yield dataclasses.replace(table, columns=columns, rows=rows)


def curves(groups: Groups) -> list[tuple[str, Canvas]]:
  """A figure of each loss over steps, with a line for each run, by its name."""
  unit = next(iter(groups.values()))[0].run.facts.loss_unit
  return [(key, _figure(groups, key, unit)) for key in _loss_keys(groups)]


def _figure(groups: Groups, key: str, unit: str) -> Canvas:
  figure = Canvas(figsize=(4.8, 3.1), layout='constrained')
  axes = figure.subplots()
  in_view = []
  for i, (letter, group) in enumerate(groups.items()):
    style = plot_style.series(i) | {'linewidth': 1.0}
    for j, one in enumerate(group):
      steps, values = _curve(one, key)
      if not values.size:
        continue
      values = plots.smooth(values, 2 * (len(values) // 50) + 1)
      label = letter if j == 0 else '_'
      mark_spacing = max(1, len(steps) // 12)
      axes.plot(steps, values, **style, markevery=mark_spacing, label=label)
      in_view.append(values[len(values) // 20 :])
  plot_style.label_axes(axes, key, unit)
  plot_style.room_around(axes, np.concatenate(in_view))
  axes.legend(fontsize='small', frameon=False)
  return figure
