"""Judges a stored result by the study as it is today.

A stored result is judged again by the claims that the study has today, so that
a claim which was mended is mended in every table. Verdicts are withheld that
rest on rows or columns which the study has revised since, or on runs of other
configs.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import verdicts
from experiments.study.parts import Claim, Preset, Revision, Row
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.verdicts import Verdict
from moe_jax.analysis.intervals import Interval

# Arguments of results that are older than the record of arguments: only those
# of full presets were stored.
_ARGUMENTS = ('--preset=full',)
_PRESET = '--preset='


def judged_again(summary: Mapping[str, Any], study: Study) -> dict[str, Any]:
  """A stored summary with the study's claims, words and columns of today.

  Args:
    summary: Summary of a preset, as it was stored.
    study: The study.

  Returns:
    The summary, with the entries `outdated`, what the study has revised since
    (`Revision` as a dict), and `marks`, sentences on what else has changed.
  """
  preset = study.presets[preset_of(summary)]
  tasks = {task.label: task for task in study.tasks.values()}
  # A task with a label of its own is not comparable.
  other_task = Task({}, summary['task'], comparable=False)
  today = {c.name: verdicts.described_column(c) for c in study.columns}
  outdated = _outdated(summary, study, preset)
  marks, size = [], (summary['steps'], len(summary['seeds']))
  if (preset.steps, preset.seeds) != size:
    marks.append(
      f'The preset has {preset.steps:,} steps and {preset.seeds} seeds today.'
    )
  # Remarks of the runs' results are as stored.
  remarks = {'remarks': study.remarks} if isinstance(study.remarks, str) else {}
  return {
    **summary,
    **verdicts.judged(
      study,
      dataclasses.replace(preset, steps=summary['steps']),
      tasks.get(summary['task'], other_task),
      [row_of(row) for row in summary['rows']],
      functools.partial(_decided, outdated),
    ),
    **remarks,
    'columns': [today.get(c['name'], c) for c in summary['columns']],
    'outdated': [dataclasses.asdict(revision) for revision in outdated],
    'earlier': [*study.earlier],
    'dropped': study.dropped,
    'exempt': study.exempt,
    'searched': bool(summary.get('rates') or study.explorations),
    'marks': marks,
  }


def arguments_of(summary: Mapping[str, Any]) -> Sequence[str]:
  """Arguments of the command that made a stored summary."""
  return summary.get('arguments', _ARGUMENTS)


def preset_of(summary: Mapping[str, Any]) -> str:
  """Name of a summary's preset; a study's only preset needs no argument."""
  for argument in arguments_of(summary):
    if argument.startswith(_PRESET):
      return argument.removeprefix(_PRESET)
  return 'full'


def row_of(stored: Mapping[str, Any]) -> Row:
  """A stored row; numbers that it lacks are NaN."""
  values = {
    name: [np.nan if v is None else v for v in numbers]
    for name, numbers in stored['values'].items()
  }
  return Row(**{**stored, 'values': values})


def _outdated(
  summary: Mapping[str, Any], study: Study, preset: Preset
) -> list[Revision]:
  """Revisions since the result, and one for configs that are others today."""
  digests, day = summary.get('configs'), summary['date'][:10]
  # Results of a revision's day are newer than it if they keep digests.
  later = [
    r
    for r in study.revisions
    if day < r.date or (day == r.date and not digests)
  ]
  if digests:
    today = study.digests(preset)
    changed = sorted(n for n in digests if today.get(n) != digests[n])
    if changed:
      names = ', '.join(changed)
      later.append(Revision('', f'Configs of today are others: {names}.'))
  return later


def _decided(
  outdated: Sequence[Revision], claim: Claim, rows: Sequence[Row], weak: str
) -> Verdict:
  """Decides a claim by stored rows, unless they are outdated or missing."""
  columns_of = {row.name: row.values.keys() for row in rows}
  for name in sorted(claim.rows()):
    if any(revision.concerns(name, claim.column) for revision in outdated):
      reason = 'the stored result is of older arms or columns'
    elif claim.column not in columns_of.get(name, ()):
      reason = f'the stored result has no {claim.column!r} of {name!r}'
    else:
      continue
    unknown = Interval(float('nan'), float('inf'))
    return Verdict(claim, unknown, verdicts.WITHHELD, reason)
  return verdicts.verdict(claim, rows, weak)
