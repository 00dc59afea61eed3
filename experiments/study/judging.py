"""Decides claims of a study, and describes its columns for a summary."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.study import claims
from experiments.study.parts import Claim, Column, Preset, Row
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.verdicts import Verdict, verdict


def underpowered(study: Study, preset: Preset) -> str:
  """The reason why runs of this size decide no claim; '' where they do.

  A preset may say so itself, and runs that are shorter than those of every
  preset are trials. Seeds are counted by claim, see `verdicts.LEAST_SEEDS`.
  """
  reasons = [preset.underpowered]
  for name in ('steps', 'start_steps'):
    least = min((getattr(p, name) for p in study.presets.values()), default=0)
    if (number := getattr(preset, name)) < least:
      words = name.replace('_', ' of the ')
      reasons.append(f'a trial of {number:,} {words}, of at least {least:,}')
  return '; '.join(filter(None, reasons))


def judged(
  study: Study, preset: Preset, task: Task, rows: Sequence[Row]
) -> list[dict[str, Any]]:
  """The study's claims with their verdicts, as JSON can hold them.

  Args:
    study: The study.
    preset: The preset that was run. Where it leaves out arms, claims about
      rows that need them are left out.
    task: The task that was run. Where it is not comparable, the claims are
      without published numbers.
    rows: Rows of the table.
  """
  weak = underpowered(study, preset)
  return [
    described(verdict(claim, rows, weak))
    for claim in claims_of(study, preset, task, rows)
  ]


def claims_of(
  study: Study, preset: Preset, task: Task, rows: Sequence[Row]
) -> list[Claim]:
  """The claims that a table is judged by; see `judged`."""
  row_names = {row.name for row in rows}
  return [
    claim if task.comparable else dataclasses.replace(claim, published=())
    for claim in study.claims
    if not preset.without or claim.rows() <= row_names
  ]


def described(decided: Verdict) -> dict[str, Any]:
  """A verdict and its claim, as JSON can hold them."""
  claim = decided.claim
  return {
    'text': claim.text,
    'column': claim.column,
    'row': claim.row,
    'than': claim.than,
    'direction': claim.direction,
    'within': claim.within,
    'published': [claims.find(a).cite() for a in claim.published],
    'difference': plain([decided.difference.mean])[0],
    'half_width': plain([decided.difference.half_width])[0],
    'verdict': decided.word,
    'reason': decided.reason,
    'note': ' '.join(filter(None, (claim.note, *claim.changes))),
  }


def plain(values: Sequence[float]) -> list[float | None]:
  """The values for JSON, which has no NaN: None stands for it."""
  return [float(v) if np.isfinite(v) else None for v in values]


def described_row(row: Row) -> dict[str, Any]:
  """A row as JSON can hold it."""
  values = {name: plain(numbers) for name, numbers in row.values.items()}
  point = {'line': row.line, 'x': row.x, 'difference': row.difference}
  return {'name': row.name, **point, 'values': values}


def described_column(column: Column) -> dict[str, Any]:
  """A column as JSON can hold it; bounds are None where there are none."""
  return {
    **{'name': column.name, 'unit': column.unit, 'digits': column.digits},
    'bounds': plain(column.bounds),
  }
