"""The two tables of a study, of its numbers and of its claims, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study.parts import Revision
from experiments.study.tables import bounds_of, markdown_table
from moe_jax.analysis.intervals import Bounds, Interval

OLDER = '†'  # the mark of cells that are older than the study


def results_table(summary: Mapping[str, Any]) -> str:
  """The table of the study's numbers; cells older than it have a mark."""
  lines = []
  for row in summary['rows']:
    line = {'': row['name']}
    for column in summary['columns']:
      unit = f' ({column["unit"]})' if column['unit'] else ''
      values = row['values'].get(column['name'], [])
      cell = _cell(values, column['digits'], bounds_of(row, column))
      is_old = any(
        Revision(**revision).concerns(row['name'], column['name'])
        for revision in summary.get('outdated', [])
      )
      line[column['name'] + unit] = cell + f' {OLDER}' * (is_old and cell != '')
    lines.append(line)
  return markdown_table(lines)


def _cell(values: Sequence[float], digits: int, bounds: Bounds) -> str:
  """A mean with its interval; both of its ends where it would pass a bound."""
  if not values or None in values:
    return ''
  if len(values) > 1 and len(set(values)) == 1:  # measured once for all seeds
    return f'{values[0]:z.{digits}f}'
  return Interval.of(values).text(f'z.{digits}f', bounds)


def claims_table(summary: Mapping[str, Any]) -> str:
  """The table of claims: published numbers, ours, verdicts; '' for no claim."""
  digits = {c['name']: c['digits'] for c in summary['columns']}
  lines = []
  for claim in summary['claims']:
    spec = f'z.{digits.get(claim["column"], 2)}f'
    mean, width = claim['difference'], claim['half_width']
    measured = 'not measured'
    if mean is not None:
      measured = f'{Interval(mean, np.inf if width is None else width):+{spec}}'
    than = claim['than']
    than = than if isinstance(than, str) else f'{than:g}'
    note = f'. {claim["note"]}' if claim['note'] else ''
    reason = f': {claim["reason"]}' if claim.get('reason') else ''
    within = claim.get('within', 0.0)
    within = f'; equal if within {within:g}' if within else ''
    lines.append(
      {
        'claim': claim['text'] + note,
        'published': ' against '.join(claim['published']),
        'here': f'{claim["column"]}, {claim["row"]} minus '
        f'{than}: {measured}{within}',
        'smallest that could be resolved': (
          'none' if width is None else f'{width:{spec}}'
        ),
        'verdict': f'**{claim["verdict"]}**{reason}',
      }
    )
  return markdown_table(lines) if lines else ''
