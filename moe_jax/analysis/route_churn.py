"""Counts of tokens that chose otherwise in another checkpoint or trace.

Two records are compared if they are of the same batch and hold the same tokens.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Int

from moe_jax.analysis.route_counts import by_gate
from moe_jax.analysis.traces import Header, LayerChoices, Record, Trace
from moe_jax.errors import InputError

_MAX_STEPS = 50


class Agreement(NamedTuple):
  """The agreement of two routings of the same tokens, as counts that add up.

  Attributes:
    tokens: Number of tokens that have a choice in either.
    same_first: Number of these tokens with the same first choice.
    same_all: Number of these tokens with the same experts, in any order.
    chosen: Number of choices of both routings together.
    common: Number of these choices whose expert the other routing has, too.
  """

  tokens: int
  same_first: int
  same_all: int
  chosen: int
  common: int

  @property
  def churn(self) -> float:
    """The share of tokens whose first choice is another expert."""
    return 1 - self.same_first / self.tokens if self.tokens else math.nan

  @property
  def churn_all(self) -> float:
    """The share of tokens that chose other experts, whatever the order."""
    return 1 - self.same_all / self.tokens if self.tokens else math.nan

  @property
  def overlap(self) -> float:
    """The share of choices that the other routing has, too."""
    return self.common / self.chosen if self.chosen else math.nan


class Change(NamedTuple):
  """The agreement of the choices at one step with those at another.

  Attributes:
    step: The step.
    other: The other step.
    layers: The agreement in each sparse layer.
  """

  step: int
  other: int
  layers: dict[int, Agreement]


class Churn(NamedTuple):
  """Changes of the choices in an evaluation over the steps of a run.

  Attributes:
    from_before: For each step but the first the change from the one before.
    to_last: For each step but the last the change until the last.
  """

  from_before: list[Change]
  to_last: list[Change]


def agreement_of(
  one: LayerChoices,
  other: LayerChoices,
  real: Bool[np.ndarray, 'B T'],
  by_expert: bool = False,
) -> Agreement:
  """Compares the choices of one layer for the same tokens.

  Args:
    one: Choices of one routing.
    other: Choices of the other routing, for the same tokens.
    real: Mask of the places that hold a token.
    by_expert: Whether experts chose; the first choice of a token is then that
      with the largest gate.
  """
  a, b = (_experts(choices, real, by_expert) for choices in (one, other))
  has_choice = (a >= 0).any(1) | (b >= 0).any(1)
  a, b = a[has_choice], b[has_choice]
  matches = (a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]
  common = matches.sum((1, 2))
  num_a, num_b = (a >= 0).sum(1), (b >= 0).sum(1)
  same_all = (common == num_a) & (common == num_b)
  return Agreement(
    tokens=len(a),
    same_first=int((a[:, 0] == b[:, 0]).sum()),
    same_all=int(same_all.sum()),
    chosen=int(num_a.sum() + num_b.sum()),
    common=int(2 * common.sum()),
  )


def _experts(
  choices: LayerChoices, real: Bool[np.ndarray, 'B T'], by_expert: bool
) -> Int[np.ndarray, 'N K']:
  expert, gate, kept = (x[real] for x in choices[:3])
  return by_gate(expert, gate, kept)[0] if by_expert else expert


def agreement(
  header: Header, records: Iterable[Record], other_records: Iterable[Record]
) -> dict[int, Agreement]:
  """Compares records of the same batches, layer by layer.

  Args:
    header: The header of either trace.
    records: Records at one step, or of one trace.
    other_records: Records of the same batches, in the same order.

  Raises:
    ValueError: The records are not of the same batches and tokens.
  """
  sums: dict[int, Agreement] = {}
  for one, other in itertools.zip_longest(records, other_records):
    _check_same(one, other)
    real = one.documents > 0
    for number, choices in one.layers.items():
      by_expert = header.layers[number].by_expert
      added = agreement_of(choices, other.layers[number], real, by_expert)
      total = sums.get(number, (0,) * len(added))
      sums[number] = Agreement(*map(sum, zip(total, added, strict=True)))
  return dict(sorted(sums.items()))


def churn(trace: Trace, kind: str, steps: Sequence[int] | None = None) -> Churn:
  """Changes of the choices in an evaluation from step to step, and to the end.

  Args:
    trace: A trace with records of the same batches at several steps.
    kind: The name of the evaluation.
    steps: The steps to compare; None takes all, or where there are more than 50
      an even selection with the first and the last.

  Raises:
    ValueError: The batches of two steps do not hold the same tokens.
  """
  if steps is None:
    steps = trace.steps_of(kind)
  if len(steps) > _MAX_STEPS:
    indices = np.linspace(0, len(steps) - 1, _MAX_STEPS).round().astype(int)
    steps = [steps[i] for i in indices]

  def change(step: int, other: int) -> Change:
    records, other_records = (trace.records(kind, (s,)) for s in (step, other))
    return Change(step, other, agreement(trace.header, records, other_records))

  return Churn(
    [change(after, before) for before, after in itertools.pairwise(steps)],
    [change(step, steps[-1]) for step in steps[:-1]],
  )


def _check_same(one: Record | None, other: Record | None) -> None:
  """Raises ValueError if two records are not of the same tokens."""
  if one is None or other is None:
    record = cast(Record, one or other)
    raise InputError(
      f'batch {record.batch} of {record.kind!r} at step {record.step} has no '
      'counterpart; both sides must have the same batches'
    )
  names = [
    f'batch {r.batch} {r.sequence or "decoder"} of {r.kind!r} at step {r.step}'
    for r in (one, other)
  ]
  if (one.batch, one.sequence) != (other.batch, other.sequence):
    raise InputError(f'{names[0]} cannot be compared with {names[1]}')
  same = np.array_equal(one.documents > 0, other.documents > 0)
  if not same or not np.array_equal(
    one.tokens[one.documents > 0], other.tokens[other.documents > 0]
  ):
    raise InputError(
      f'{names[0]} and {names[1]} hold different tokens; choices can be '
      'compared only of the same tokens'
    )
  if set(one.layers) != set(other.layers):
    raise InputError(
      f'{names[0]} has layers {sorted(one.layers)}, {names[1]} '
      f'{sorted(other.layers)}'
    )
