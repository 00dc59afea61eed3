"""The two tables of a study, of its numbers and of its claims.

Each is a list of lines, which are cells by heading, for pages, and Markdown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study.parts import Revision
from experiments.study.tables import bounds_of, markdown_table
from moe_jax.analysis.intervals import Bounds, Interval

OLDER = '†'  # the mark of cells that are older than the study


def results_table(summary: Mapping[str, Any]) -> str:
  """The table of the study's numbers, in Markdown."""
  return markdown_table(result_lines(summary))


def result_lines(summary: Mapping[str, Any]) -> list[dict[str, str]]:
  """The lines of the table of numbers, each with its cells by heading."""
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
  return lines


def _cell(values: Sequence[float], digits: int, bounds: Bounds) -> str:
  """A mean with its interval; both of its ends where it would pass a bound."""
  if not values or None in values:
    return ''
  if len(values) > 1 and len(set(values)) == 1:  # measured once for all seeds
    return f'{values[0]:z.{digits}f}'
  return Interval.of(values).text(f'z.{digits}f', bounds)


def claims_table(summary: Mapping[str, Any]) -> str:
  """The table of claims in Markdown: published numbers, ours, verdicts."""
  lines = claim_lines(summary)
  for line, claim in zip(lines, summary['claims'], strict=True):
    line['verdict'] = f'**{claim["verdict"]}**{_reason(claim)}'
  return markdown_table(lines) if lines else ''


def claim_lines(summary: Mapping[str, Any]) -> list[dict[str, str]]:
  """The lines of the table of claims, each with its cells by heading."""
  digits = {c['name']: c['digits'] for c in summary['columns']}
  lines = []
  for claim in summary['claims']:
    spec = f'z.{digits.get(claim["column"], 2)}f'
    difference = interval_of(claim)
    measured = f'{difference:+{spec}}'
    if claim['difference'] is None:
      measured = 'not measured'
    than = claim['than']
    than = than if isinstance(than, str) else f'{than:g}'
    note = f'. {claim["note"]}' if claim['note'] else ''
    within = claim.get('within', 0.0)
    within = f'; equal if within {within:g}' if within else ''
    lines.append(
      {
        'claim': claim['text'] + note,
        'published': ' against '.join(claim['published']),
        'here': f'{claim["column"]}, {claim["row"]} minus '
        f'{than}: {measured}{within}',
        'smallest that could be resolved': _width(difference.half_width, spec),
        'verdict': claim['verdict'] + _reason(claim),
      }
    )
  return lines


def _reason(claim: Mapping[str, Any]) -> str:
  """The reason of a verdict that is withheld, after a colon, or ''."""
  return f': {claim["reason"]}' if claim.get('reason') else ''


def interval_of(claim: Mapping[str, Any]) -> Interval:
  """The difference of a claim in a summary; NaN where it is not measured."""
  mean, width = claim['difference'], claim['half_width']
  return Interval(
    float('nan') if mean is None else mean,
    float('inf') if width is None else width,
  )


def _width(half_width: float, spec: str) -> str:
  return f'{half_width:{spec}}' if np.isfinite(half_width) else 'none'
