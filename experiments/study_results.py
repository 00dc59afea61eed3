"""What becomes of a study's numbers: verdicts, table, figure, files.

A direction counts as reproduced only where the paired 95 % interval of the
difference excludes zero on the paper's side. Not here: all studies on one page
(`report.py`).
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from experiments import claims, tasks, timing
from experiments.tables import Interval, markdown_table
from moe_jax.config import unknown

SUMMARY, PICTURE, TABLE = 'summary.json', 'figure.png', 'table.md'
REPRODUCED, OPPOSITE = 'direction reproduced', 'opposite'
UNRESOLVED = 'not resolved'


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the seeds say of a claim.

  Attributes:
    claim: A `study.Claim`.
    difference: Row minus the other, paired by seed.
    word: `REPRODUCED`, `OPPOSITE` or `UNRESOLVED`.
  """

  claim: Any
  difference: Interval
  word: str

  @property
  def resolvable(self) -> float:
    """The smallest difference that these seeds could have told from zero."""
    return self.difference.half_width


def verdict(claim: Any, rows: Sequence[Any]) -> Verdict:
  """Of one claim.

  Raises:
    ValueError: It names a row or column that does not exist.
  """
  mine = _values(claim.row, claim.column, rows)
  if isinstance(claim.than, str):
    others = _values(claim.than, claim.column, rows)
  else:
    others = [claim.than] * len(mine)
  difference = Interval.of([a - b for a, b in zip(mine, others, strict=True)])
  wanted = 1 if claim.direction == 'higher' else -1
  word = {wanted: REPRODUCED, -wanted: OPPOSITE, 0: UNRESOLVED}
  return Verdict(claim, difference, word[difference.sign()])


def _values(name: str, column: str, rows: Sequence[Any]) -> Sequence[float]:
  found = [row for row in rows if row.name == name]
  if not found:
    raise unknown('row', name, [row.name for row in rows])
  if column not in found[0].values:
    raise unknown('column', column, found[0].values)
  return found[0].values[column]


def found(
  study: Any,
  preset: Any,
  task: str,
  rows: Sequence[Any],
  results: Mapping[str, Sequence[Mapping[str, Any]]],
  *,
  minutes: float,
) -> dict[str, Any]:
  """All that the study came to, as JSON can hold it; `report` reads it."""
  digests = {run['data_digest'] for runs in results.values() for run in runs}
  verdicts = [verdict(claim, rows) for claim in study.claims]
  facts = timing.facts()
  return {
    'name': study.name,
    'title': study.title,
    'source': study.source,
    'task': tasks.task(task).label,
    'steps': preset.steps,
    'seeds': list(range(preset.seeds)),
    'overrides': dict(preset.overrides),
    'digests': sorted(digests),
    'device': f'{facts["device"]}, {facts["cores"]} cores',
    'date': facts['date'],
    'jax': facts['jax'],
    'minutes': round(minutes, 1),
    'columns': [
      {'name': c.name, 'unit': c.unit, 'digits': c.digits}
      for c in study.columns
    ],
    'rows': [
      {
        'name': row.name,
        'line': row.line,
        'x': row.x,
        'values': {k: list(v) for k, v in row.values.items()},
      }
      for row in rows
    ],
    'claims': [_described(v) for v in verdicts],
    'remarks': study.remarks,
  }


def _described(found: Verdict) -> dict[str, Any]:
  claim = found.claim
  return {
    'text': claim.text,
    'column': claim.column,
    'row': claim.row,
    'than': claim.than,
    'direction': claim.direction,
    'published': [claims.find(a).cite() for a in claim.published],
    'difference': found.difference.mean,
    'half_width': found.difference.half_width,
    'verdict': found.word,
    'note': claim.note,
  }


def text_of(summary: Mapping[str, Any], picture: str = PICTURE) -> str:
  """The study's part of a page, in Markdown."""
  seeds = summary['seeds']
  lines = [
    f'## {summary["title"]}',
    '',
    f'{summary["source"]}. `python -m experiments.{summary["name"]}`: '
    f'{summary["task"]} (sha256 '
    f'{", ".join(digest[:12] for digest in summary["digests"])}), '
    f'{summary["steps"]:,} steps, paired seeds {seeds[0]} to {seeds[-1]}'
    f'{_overrides(summary)}; {summary["device"]}, {summary["date"]}, jax '
    f'{summary["jax"]}; {summary["minutes"]:g} minutes of runs, a core each. '
    f'± is a 95 % confidence interval over seeds (Student).',
    '',
    results_table(summary),
    '',
    claims_table(summary),
  ]
  if summary['remarks']:
    lines += ['', summary['remarks']]
  lines += ['', f'![{summary["title"]}]({picture})', '']
  return '\n'.join(lines)


def _overrides(summary: Mapping[str, Any]) -> str:
  changed = [f'`{k}={v}`' for k, v in summary['overrides'].items()]
  return f', {", ".join(changed)}' if changed else ''


def results_table(summary: Mapping[str, Any]) -> str:
  """A row a row, a column a column."""
  lines = []
  for row in summary['rows']:
    line = {'': row['name']}
    for column in summary['columns']:
      unit = f' ({column["unit"]})' if column['unit'] else ''
      values = row['values'].get(column['name'], [])
      line[column['name'] + unit] = _cell(values, column['digits'])
    lines.append(line)
  return markdown_table(lines)


def _cell(values: Sequence[float], digits: int) -> str:
  if not len(values) or not np.isfinite(values).all():
    return ''
  return f'{Interval.of(values):.{digits}f}'


def claims_table(summary: Mapping[str, Any]) -> str:
  """What was published, what is found here, and the verdict."""
  digits = {c['name']: c['digits'] for c in summary['columns']}
  lines = []
  for claim in summary['claims']:
    spec = f'.{digits[claim["column"]]}f'
    difference = Interval(claim['difference'], claim['half_width'])
    than = claim['than']
    than = than if isinstance(than, str) else f'{than:g}'
    note = f' {claim["note"]}' if claim['note'] else ''
    lines.append(
      {
        'claim': claim['text'] + note,
        'published': ' against '.join(claim['published']),
        'here': f'{claim["column"]}, {claim["row"]} minus '
        f'{than}: {difference:+{spec}}',
        'smallest that could be told': _width(difference.half_width, spec),
        'verdict': f'**{claim["verdict"]}**',
      }
    )
  return markdown_table(lines)


def _width(half_width: float, spec: str) -> str:
  return f'{half_width:{spec}}' if np.isfinite(half_width) else 'none'


def write(
  folder: pathlib.Path,
  study: Any,
  summary: Mapping[str, Any],
  configs: Mapping[str, ml_collections.ConfigDict],
) -> str:
  """Writes table, rows, figure, summary and configs; the table's text."""
  (folder / 'configs').mkdir(parents=True, exist_ok=True)
  text = text_of(summary)
  (folder / TABLE).write_text(text, encoding='utf-8')
  (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + '\n')
  for i, (name, config) in enumerate(configs.items()):
    path = folder / 'configs' / f'{i:02d}.json'
    about = {'arm': name, 'config': config.to_dict()}
    path.write_text(json.dumps(about, indent=2, default=list) + '\n')
  with (folder / 'rows.csv').open('w', newline='', encoding='utf-8') as file:
    writer = csv.writer(file)
    writer.writerow(['row', 'column', 'unit', 'seed', 'value'])
    for row in summary['rows']:
      for column in summary['columns']:
        values = row['values'].get(column['name'], [])
        for seed, value in zip(summary['seeds'], values, strict=False):
          writer.writerow(
            [row['name'], column['name'], column['unit'], seed, value]
          )
  draw(study.figure, summary, folder / PICTURE)
  return text


def draw(spec: Any, summary: Mapping[str, Any], path: pathlib.Path) -> None:
  """The figure: a panel a column; rows along x where they have one."""
  panels = [c for c in summary['columns'] if c['name'] in spec.columns]
  rows = summary['rows']
  height = 3.6 if spec.x_label else 1.2 + 0.3 * len(rows)
  figure = Figure(figsize=(4.8 * len(panels), height), layout='constrained')
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for ax, column in zip(axes, panels, strict=True):
    label = column['name'] + (f' ({column["unit"]})' if column['unit'] else '')
    if spec.x_label:
      _lines(ax, spec, rows, column['name'])
      ax.set_ylabel(label)
    else:
      _points(ax, rows, column['name'], labels=ax is axes[0])
      ax.set_xlabel(label)
  figure.suptitle(summary['title'], fontsize=10)
  figure.savefig(path, dpi=110)


def _shown(row, column) -> Interval | None:
  values = row['values'].get(column, [])
  if not len(values) or not np.isfinite(values).all():
    return None
  return Interval.of(values)


def _bar(interval: Interval) -> float:
  return interval.half_width if np.isfinite(interval.half_width) else 0.0


def _lines(ax, spec, rows, column: str) -> None:
  shown = [(row, i) for row in rows if (i := _shown(row, column)) is not None]
  lines = dict.fromkeys(row['line'] for row, _ in shown if row['x'] is not None)
  for line in lines:
    at = sorted(
      (row['x'], interval.mean, _bar(interval))
      for row, interval in shown
      if row['line'] == line and row['x'] is not None
    )
    xs, means, bars = zip(*at, strict=True)
    ax.errorbar(xs, means, bars, marker='o', capsize=3, label=line)
  for row, interval in shown:
    if row['x'] is None:
      ax.axhline(interval.mean, color='0.4', linestyle='--', label=row['name'])
  if spec.log_x:
    ax.set_xscale('log', base=2)
    ticks = sorted({row['x'] for row, _ in shown if row['x'] is not None})
    ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
  ax.set_xlabel(spec.x_label)
  ax.legend(fontsize=8)


def _points(ax, rows, column: str, *, labels: bool) -> None:
  for i, row in enumerate(rows):
    interval = _shown(row, column)
    if interval is not None:
      ax.errorbar(interval.mean, i, xerr=_bar(interval), marker='o', capsize=3)
  names = [row['name'] for row in rows] if labels else [''] * len(rows)
  ax.set_yticks(range(len(rows)), names)
  ax.invert_yaxis()
