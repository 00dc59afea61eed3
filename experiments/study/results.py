"""What becomes of a study's numbers: verdicts, table, figure, files.

A direction counts as reproduced only where the paired 95 % interval of the
difference excludes zero on the paper's side. Not here: all studies on one page
(`experiments/report.py`).
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.benchmarks import timing
from experiments.study import claims, figures
from experiments.study.tables import Interval, markdown_table
from experiments.study.tasks import Task
from moe_jax.config import unknown
from moe_jax.runs.workdir import write_text

SUMMARY, PICTURE, TABLE = 'summary.json', 'figure.png', 'table.md'
REPRODUCED, OPPOSITE = 'direction reproduced', 'opposite'
SHOWN, REFUTED = 'shown', 'refuted'  # of what no paper printed
UNRESOLVED = 'not resolved'
WORDS = (REPRODUCED, OPPOSITE, SHOWN, REFUTED, UNRESOLVED)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the seeds say of a claim.

  Attributes:
    claim: A `study.Claim`.
    difference: Row minus the other, paired by seed.
    word: `REPRODUCED` or `OPPOSITE`, `SHOWN` or `REFUTED` where nothing was
      published that is verified; or `UNRESOLVED`.
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
  marks = {claims.find(address).mark for address in claim.published}
  known = bool(marks) and 'unverified' not in marks
  yes, no = (REPRODUCED, OPPOSITE) if known else (SHOWN, REFUTED)
  word = {wanted: yes, -wanted: no, 0: UNRESOLVED}
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
  task: Task,
  rows: Sequence[Any],
  results: Mapping[str, Sequence[Mapping[str, Any]]],
  times: Mapping[str, timing.Spread],
) -> dict[str, Any]:
  """All that the study came to, as JSON can hold it; `report` reads it."""
  runs = [run for arm in results.values() for run in arm]
  made = [run['made'] for run in runs]
  verdicts = [verdict(claim, rows) for claim in study.claims]
  return {
    'name': study.name,
    'title': study.title,
    'source': study.source,
    'task': task.label,
    'steps': preset.steps,
    'seeds': list(range(preset.seeds)),
    'overrides': dict(preset.overrides),
    'digests': sorted({run['data_digest'] for run in runs}),
    'device': _all({f'{m["device"]}, {m["cores"]} cores' for m in made}),
    'date': _all({m['date'][:10] for m in made}),
    'jax': _all({m['jax'] for m in made}),
    'minutes': round(sum(m['minutes'] for m in made), 1),
    'times': {name: f'{spread:.2f}' for name, spread in times.items()},
    'columns': [
      {'name': c.name, 'unit': c.unit, 'digits': c.digits}
      for c in study.columns
    ],
    'rows': [
      {
        'name': row.name,
        'line': row.line,
        'x': row.x,
        'values': {k: _plain(v) for k, v in row.values.items()},
      }
      for row in rows
    ],
    'claims': [_described(v) for v in verdicts],
    'remarks': study.remarks,
  }


def _all(names: Collection[str]) -> str:
  return ' and '.join(sorted(names))


def _plain(values: Sequence[float]) -> list[float | None]:
  """As JSON has them: it knows no NaN."""
  return [float(v) if np.isfinite(v) else None for v in values]


def _described(found: Verdict) -> dict[str, Any]:
  claim = found.claim
  return {
    'text': claim.text,
    'column': claim.column,
    'row': claim.row,
    'than': claim.than,
    'direction': claim.direction,
    'published': [claims.find(a).cite() for a in claim.published],
    'difference': _plain([found.difference.mean])[0],
    'half_width': _plain([found.difference.half_width])[0],
    'verdict': found.word,
    'note': claim.note,
  }


def text_of(summary: Mapping[str, Any], picture: str = PICTURE) -> str:
  """The study's part of a page, in Markdown."""
  seeds = summary['seeds']
  length = summary.get('length', f'{summary["steps"]:,} steps')
  lines = [
    f'## {summary["title"]}',
    '',
    f'{summary["source"]}. `{_command(summary)}`: '
    f'{summary["task"]} (sha256 '
    f'{", ".join(digest[:12] for digest in summary["digests"])}), '
    f'{length}, paired seeds {seeds[0]} to {seeds[-1]}'
    f'{_overrides(summary)}; {summary["device"]}, {summary["date"]}, jax '
    f'{summary["jax"]}; {summary["minutes"]:g} minutes of runs, a core each. '
    f'± is a 95 % confidence interval over seeds (Student).',
    '',
    results_table(summary),
    '',
    claims_table(summary),
  ]
  if summary['times']:
    found = [f'{name} {spread}' for name, spread in summary['times'].items()]
    lines += ['', f'Step times, medians and quartiles: {"; ".join(found)}.']
  if summary['remarks']:
    lines += ['', summary['remarks']]
  lines += ['', f'![{summary["title"]}]({picture})', '']
  return '\n'.join(lines)


def _command(summary: Mapping[str, Any]) -> str:
  """What makes it again."""
  arguments = summary.get('arguments', [])
  return ' '.join([f'python -m experiments.{summary["name"]}', *arguments])


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
  if not values or None in values:
    return ''
  if len(values) > 1 and len(set(values)) == 1:  # measured once for all seeds
    return f'{values[0]:z.{digits}f}'
  return f'{Interval.of(values):z.{digits}f}'


def claims_table(summary: Mapping[str, Any]) -> str:
  """What was published, what is found here, and the verdict."""
  digits = {c['name']: c['digits'] for c in summary['columns']}
  lines = []
  for claim in summary['claims']:
    spec = f'z.{digits[claim["column"]]}f'
    difference = _interval(claim)
    than = claim['than']
    than = than if isinstance(than, str) else f'{than:g}'
    note = f'. {claim["note"]}' if claim['note'] else ''
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
  return markdown_table(lines) if lines else ''


def _interval(claim: Mapping[str, Any]) -> Interval:
  mean, width = claim['difference'], claim['half_width']
  return Interval(
    float('nan') if mean is None else mean,
    float('inf') if width is None else width,
  )


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
  figures.draw(study.figure, summary, folder / PICTURE)
  # Last and whole: `report` takes the figure of every summary that it finds.
  write_text(folder / SUMMARY, json.dumps(summary, indent=1) + '\n')
  return text
