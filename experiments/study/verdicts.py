"""Decides claims by paired seeds.

A direction counts as reproduced only where the 95 % interval of the paired
difference excludes zero on the paper's side, and the absence of a difference
only where the interval is within the bound that the claim names. A verdict is
withheld where runs are too few or too short to decide anything, and where a
gate of the study is closed: what its question presupposes was not seen. Where
seeds were added when the results of others were known, they alone decide.

A claim is the paper's where all its published numbers are verified, else ours.
A check, which could not have failed, is neither: `checks.json` has the reason.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.study import claims
from experiments.study.parts import (
  Claim,
  Column,
  Preset,
  Row,
  matches,
  stated,
)
from experiments.study.study import Study
from experiments.study.tasks import Task
from moe_jax.analysis.intervals import Interval
from moe_jax.config import unknown

REPRODUCED, OPPOSITE = 'direction reproduced', 'opposite'
# Verdicts on claims without verified published numbers.
SHOWN, REFUTED = 'shown', 'refuted'
UNRESOLVED, WITHHELD = 'not resolved', 'withheld'
WORDS = (REPRODUCED, OPPOSITE, SHOWN, REFUTED, UNRESOLVED, WITHHELD)
# Smallest number of seeds that decides a claim. With two, the spread rests on a
# single difference: where the two agree by accident the interval is narrow, and
# excludes zero however small the effect. With three an interval is still 4.3
# standard errors wide on either side.
LEAST_SEEDS = 3
CHECK, PAPERS, OURS = 'check', 'paper', 'ours'
CHECKS = pathlib.Path(__file__).with_name('checks.json')
# Share of false discoveries among resolved findings that is accepted.
FALSE_DISCOVERIES = 0.05


@functools.cache
def checks() -> dict[str, dict[str, str]]:
  """The reasons why checks could not have failed, by study and claim."""
  return json.loads(CHECKS.read_text(encoding='utf-8'))


class Verdict(NamedTuple):
  """The verdict on a claim.

  Attributes:
    claim: The claim.
    difference: Mean difference of the claim's row and the other, paired by
      seed, with its interval.
    word: `REPRODUCED` or `OPPOSITE`; `SHOWN` or `REFUTED` where no verified
      number was published; `UNRESOLVED`; or `WITHHELD`.
    reason: Reason why the verdict is withheld; '' where it is not.
    p: Probability of a difference so far on either side, were there none; of
      one so far within the bound, were it as large as that. NaN where the
      verdict is withheld.
  """

  claim: Claim
  difference: Interval
  word: str
  reason: str = ''
  p: float = float('nan')

  def described(self) -> dict[str, Any]:
    """The verdict and its claim without its text, as JSON can hold them."""
    claim = self.claim
    return {
      'column': claim.column,
      'row': claim.row,
      'than': claim.than,
      'direction': claim.direction,
      'within': claim.within,
      'published': [claims.find(a).cite() for a in claim.published],
      'difference': plain([self.difference.mean])[0],
      'half_width': plain([self.difference.half_width])[0],
      'verdict': self.word,
      'reason': self.reason,
      'p': plain([self.p])[0],
      'note': ' '.join(filter(None, (claim.note, *claim.changes))),
    }


def plain(values: Sequence[float]) -> list[float | None]:
  """The values for JSON, which has no NaN: None stands for it."""
  return [float(v) if np.isfinite(v) else None for v in values]


def verdict(claim: Claim, rows: Sequence[Row], withheld: str = '') -> Verdict:
  """The verdict on one claim.

  Args:
    claim: The claim.
    rows: Rows of the table.
    withheld: Reason why the runs decide no claim; '' where they do. With fewer
      than `LEAST_SEEDS` seeds, or where the claim has a reason of its own, the
      verdict is withheld in any case.

  Raises:
    ValueError: The claim names a row or column that does not exist.
  """
  numbers = _values(claim.row, claim.column, rows)
  if isinstance(claim.than, str):
    other_numbers = _values(claim.than, claim.column, rows)
  else:
    other_numbers = [claim.than] * len(numbers)
  differences = [a - b for a, b in zip(numbers, other_numbers, strict=True)]
  difference = Interval(float('nan'), float('inf'))  # of no seeds
  if differences:
    difference = Interval.of(differences)
  shortage = f'{len(numbers)} of at least {LEAST_SEEDS} seeds'
  shortage *= len(numbers) < LEAST_SEEDS
  if withheld := '; '.join(filter(None, (claim.withheld, shortage, withheld))):
    return Verdict(claim, difference, WITHHELD, withheld)
  yes, no = (REPRODUCED, OPPOSITE) if is_papers(claim) else (SHOWN, REFUTED)
  word = {1: yes, -1: no, 0: UNRESOLVED}[_side(claim, difference)]
  p = _p_value(claim, difference, len(numbers))
  return Verdict(claim, difference, word, p=p)


def is_papers(claim: Claim) -> bool:
  """Whether a paper has the claim's numbers, and all of them are verified."""
  marks = {claims.find(address).mark for address in claim.published}
  return bool(marks) and 'unverified' not in marks


def _p_value(claim: Claim, difference: Interval, seeds: int) -> float:
  distance = abs(difference.mean)
  if claim.direction == 'equal':
    distance = abs(claim.within - distance)
  if not difference.half_width:  # counted, not measured
    return float(not distance)
  student = stats.t(seeds - 1)
  error = difference.half_width / student.ppf(0.975)
  return float(2 * student.sf(distance / error))


def _side(claim: Claim, difference: Interval) -> int:
  """1 where the interval is on the claim's side, -1 on the other, else 0.

  Two rows are equal where the whole interval is within the claim's bound (two
  one-sided tests), and unequal where all of it is beyond.
  """
  if claim.direction != 'equal':
    return difference.sign() * (1 if claim.direction == 'higher' else -1)
  if abs(difference.mean) + difference.half_width < claim.within:
    return 1
  beyond = abs(difference.mean) - difference.half_width > claim.within
  return -1 if beyond else 0


def _values(name: str, column: str, rows: Sequence[Row]) -> Sequence[float]:
  values = {row.name: row.values for row in reversed(rows)}
  if name not in values:
    raise unknown('row', name, [row.name for row in rows])
  if column not in values[name]:
    raise unknown('column', column, values[name])
  return values[name][column]


def underpowered(study: Study, preset: Preset) -> str:
  """The reason why runs of this size decide no claim; '' where they do.

  A preset may say so itself, and runs that are shorter than those of every
  preset are trials. Seeds are counted by claim, see `LEAST_SEEDS`.
  """
  reasons = [preset.underpowered]
  for name in ('steps', 'start_steps'):
    least = min((getattr(p, name) for p in study.presets.values()), default=0)
    if (number := getattr(preset, name)) < least:
      words = name.replace('_', ' of the ')
      reasons.append(f'a trial of {number:,} {words}, of at least {least:,}')
  return '; '.join(filter(None, reasons))


def judged(
  study: Study,
  preset: Preset,
  task: Task,
  rows: Sequence[Row],
  decide: Callable[[Claim, Sequence[Row], str], Verdict] = verdict,
) -> dict[str, Any]:
  """The entries of a summary that follow from rows and the study as it is now.

  They are the study's title, source and date, the rows, the gates, which all
  seeds decide, and the claims, which those decide that had not been seen.

  Args:
    study: The study.
    preset: The preset that was run. Where it leaves out arms, claims about
      rows that need them are left out.
    task: The task that was run. Where it is not comparable, the claims are
      without published numbers.
    rows: Rows of the table.
    decide: Function that decides a claim; see `verdict`.
  """
  row_names, weak = {row.name for row in rows}, underpowered(study, preset)
  deciding_rows = [row.without_first(preset.seeds_seen) for row in rows]
  gates = {
    compared: decide(Claim(compared), rows, weak)
    for compared in study.gates
    if not preset.without or Claim(compared).rows() <= row_names
  }
  decided = []
  for text, claim in stated(study.claims).items():
    if not task.comparable:
      claim = dataclasses.replace(claim, published=())
    if not preset.without or claim.rows() <= row_names:
      verdict_on = decide(claim, deciding_rows, weak)
      for compared, patterns in study.gates.items():
        word = gates[compared].word if compared in gates else 'not run'
        is_open = word == SHOWN or claim.compared == compared
        if is_open or not matches(text, patterns):
          continue
        closed = f'the gate "{compared}" is {word}'
        reason = '; '.join(filter(None, (verdict_on.reason, closed)))
        verdict_on = Verdict(claim, verdict_on.difference, WITHHELD, reason)
      kind = PAPERS if is_papers(claim) else OURS
      reason = checks().get(study.name, {}).get(text, '')
      about = {'kind': CHECK if reason else kind, 'check': reason}
      about |= {'text': text, 'doubtful': False}
      decided.append({**about, **verdict_on.described()})
  return {
    'title': study.title,
    'source': study.source,
    'written': study.written,
    'seeds_seen': preset.seeds_seen,
    'rows': [described_row(row) for row in rows],
    'gates': [{'text': k, **v.described()} for k, v in gates.items()],
    'claims': decided,
  }


def mark_false_discoveries(summaries: Sequence[dict[str, Any]]) -> None:
  """Sets `doubtful` of claims that fall at 5 % of false discoveries.

  The procedure is Benjamini and Hochberg's, over the findings of all studies;
  checks and withheld verdicts are left out.
  """
  found = [
    claim
    for summary in summaries
    for claim in summary['claims']
    if claim['kind'] != CHECK and claim['p'] is not None
  ]
  if not found:
    return
  adjusted = stats.false_discovery_control([c['p'] for c in found])
  for claim, p in zip(found, adjusted):
    resolved = claim['verdict'] != UNRESOLVED
    claim['doubtful'] = bool(resolved and p > FALSE_DISCOVERIES)


def described_row(row: Row) -> dict[str, Any]:
  """A row as JSON can hold it."""
  values = {name: plain(numbers) for name, numbers in row.values.items()}
  return {**vars(row), 'values': values}


def described_column(column: Column) -> dict[str, Any]:
  """A column as JSON can hold it; bounds are None where there are none."""
  shown = {name: getattr(column, name) for name in ('name', 'unit', 'digits')}
  return {**shown, 'bounds': plain(column.bounds)}
