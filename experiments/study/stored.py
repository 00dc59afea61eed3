"""Judges a stored result by the study as it is today.

A stored result is judged again by the claims that the study has today, so that
a claim which was mended is mended in every table. Verdicts are withheld that
rest on rows or columns which the study has revised since, or on runs of other
configs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import code_digest, judging
from experiments.study.parts import Claim, Revision, Row
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.verdicts import WITHHELD, Verdict, verdict
from moe_jax.analysis.intervals import Interval

# Arguments of results that are older than the record of arguments: only those
# of full presets were stored.
_ARGUMENTS = ('--preset=full',)
_PRESET = '--preset='
_UNKNOWN = Interval(float('nan'), float('inf'))


def judged_again(summary: Mapping[str, Any], study: Study) -> dict[str, Any]:
  """A stored summary with the study's claims, words and columns of today.

  Args:
    summary: Summary of a preset, as it was stored.
    study: The study.

  Returns:
    The summary, with the entries `outdated`, what the study has revised since
    (`Revision` as a dict), and `marks`, sentences on what else has changed.
  """
  preset = study.presets.get(preset_of(summary))
  if preset is None:
    preset = next(iter(study.presets.values()))
  ran_preset = dataclasses.replace(preset, steps=summary['steps'])
  task = _task(summary, study)
  today = {column.name: column for column in study.columns}
  rows = [row_of(row) for row in summary['rows']]
  outdated = _outdated(summary, study)
  weak = judging.underpowered(study, ran_preset)
  return {
    **summary,
    **{'title': study.title, 'source': study.source},
    'columns': [
      judging.described_column(today[column['name']])
      if column['name'] in today
      else column
      for column in summary['columns']
    ],
    'rows': [judging.described_row(row) for row in rows],
    'claims': [
      judging.described(_decided(claim, rows, outdated, weak))
      for claim in judging.claims_of(study, preset, task, rows)
    ],
    'written': study.written,
    # Remarks of the runs' results are as stored.
    'remarks': study.remarks
    if isinstance(study.remarks, str)
    else summary['remarks'],
    'outdated': [dataclasses.asdict(revision) for revision in outdated],
    'marks': _marks(summary, study),
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


def _task(summary: Mapping[str, Any], study: Study) -> Task:
  """The task of a summary; one with a label of its own is not comparable."""
  for task in study.tasks.values():
    if task.label == summary['task']:
      return task
  return Task({}, summary['task'], comparable=False)


def row_of(stored: Mapping[str, Any]) -> Row:
  """A stored row; numbers that it lacks are NaN."""
  values = {
    name: [np.nan if v is None else v for v in numbers]
    for name, numbers in stored['values'].items()
  }
  return Row(
    stored['name'],
    values,
    stored['line'],
    stored['x'],
    stored.get('difference', False),
  )


def _outdated(summary: Mapping[str, Any], study: Study) -> list[Revision]:
  """Revisions since the result, and one for configs that are others today."""
  digests, preset = (
    summary.get('configs'),
    study.presets.get(preset_of(summary)),
  )
  day = summary['date'][:10]
  # Results of a revision's day are newer than it if they keep digests.
  later = [
    r
    for r in study.revisions
    if day < r.date or (day == r.date and not digests)
  ]
  if preset is None:
    later.append(Revision('', 'The study has no such preset any more.'))
  elif digests:
    today = study.digests(preset)
    changed = sorted(
      name for name in digests if today.get(name) != digests[name]
    )
    if changed:
      names = ', '.join(changed)
      later.append(Revision('', f'Configs of today are others: {names}.'))
  return later


def _decided(
  claim: Claim, rows: Sequence[Row], outdated: Sequence[Revision], weak: str
) -> Verdict:
  """The verdict by stored rows, withheld where these are outdated or lack."""
  columns_of = {row.name: row.values.keys() for row in rows}
  for name in sorted(claim.rows()):
    if any(revision.concerns(name, claim.column) for revision in outdated):
      reason = 'the stored result is of older arms or columns'
    elif claim.column not in columns_of.get(name, ()):
      reason = f'the stored result has no {claim.column!r} of {name!r}'
    else:
      continue
    return Verdict(claim, _UNKNOWN, WITHHELD, reason)
  return verdict(claim, rows, weak)


def _marks(summary: Mapping[str, Any], study: Study) -> list[str]:
  """Sentences on a preset, or code, that is another today."""
  marks, preset = [], study.presets.get(preset_of(summary))
  if preset is not None:
    stored_size = summary['steps'], len(summary['seeds'])
    if (preset.steps, preset.seeds) != stored_size:
      marks.append(
        f'The preset has {preset.steps:,} steps and {preset.seeds} seeds today.'
      )
  return marks + older_code(summary.get('code', ()))


def older_code(digests: Sequence[str]) -> list[str]:
  """A sentence if runs are of an older state of the code, in a list.

  Args:
    digests: Digests of the code that made the runs; none where none were kept.
  """
  today = code_digest.digest()
  if not set(digests) - {today}:
    return []
  subject = 'Some of the runs' if today in digests else 'The runs'
  return [f'{subject} are of an older state of the code of `moe_jax`.']
