"""Decides claims by paired seeds.

A direction counts as reproduced only where the 95 % interval of the paired
difference excludes zero on the paper's side, and the absence of a difference
only where the interval is within the bound that the claim names. A verdict is
withheld where runs are too few or too short to decide anything.
"""

import dataclasses
from collections.abc import Sequence

from experiments.study import claims
from experiments.study.parts import Claim, Row
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


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The verdict on a claim.

  Attributes:
    claim: The claim.
    difference: Mean difference of the claim's row and the other, paired by
      seed, with its interval.
    word: `REPRODUCED` or `OPPOSITE`; `SHOWN` or `REFUTED` where no verified
      number was published; `UNRESOLVED`; or `WITHHELD`.
    reason: Reason why the verdict is withheld; '' where it is not.
  """

  claim: Claim
  difference: Interval
  word: str
  reason: str = ''


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
  difference = Interval.of(
    [a - b for a, b in zip(numbers, other_numbers, strict=True)]
  )
  shortage = f'{len(numbers)} of at least {LEAST_SEEDS} seeds'
  shortage *= len(numbers) < LEAST_SEEDS
  if withheld := '; '.join(filter(None, (claim.withheld, shortage, withheld))):
    return Verdict(claim, difference, WITHHELD, withheld)
  marks = {claims.find(address).mark for address in claim.published}
  is_published = bool(marks) and 'unverified' not in marks
  yes, no = (REPRODUCED, OPPOSITE) if is_published else (SHOWN, REFUTED)
  return Verdict(
    claim, difference, {1: yes, -1: no, 0: UNRESOLVED}[_side(claim, difference)]
  )


def _side(claim: Claim, difference: Interval) -> int:
  """1 where the interval is on the claim's side, -1 on the other, else 0.

  Two rows are equal where the whole interval is within the claim's bound (two
  one-sided tests), and unequal where all of it is beyond.
  """
  match claim.direction:
    case 'higher':
      return difference.sign()
    case 'lower':
      return -difference.sign()
  if abs(difference.mean) + difference.half_width < claim.within:
    return 1
  beyond = abs(difference.mean) - difference.half_width > claim.within
  return -1 if beyond else 0


def _values(name: str, column: str, rows: Sequence[Row]) -> Sequence[float]:
  matching = [row for row in rows if row.name == name]
  if not matching:
    raise unknown('row', name, [row.name for row in rows])
  if column not in matching[0].values:
    raise unknown('column', column, matching[0].values)
  return matching[0].values[column]
