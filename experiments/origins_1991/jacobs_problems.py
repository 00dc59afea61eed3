"""The problems that 1991's systems learn: cases, targets, stopping criterion.

Not here: how they are learned (`jacobs_runs.py`).
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data import ClassSource
from moe_jax.errors import InputError
from moe_jax.models.adaptive import (
  AdaptiveMixture,
  AdaptiveOptions,
  MixtureOptions,
)

RATES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
# Squared error at which a run stops, as in the paper.
ERROR = 0.08


class Kind(NamedTuple):
  """A kind of targets; `Problem` describes its fields."""

  expert_output: str
  error: float
  rates: tuple[float, ...]


TARGETS = {
  'pairs': Kind('logistic', ERROR, RATES),
  # The slope of a linear output does not shrink: its rates are smaller.
  'linear_pairs': Kind('linear', 0.11, (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)),
  'one_hot': Kind('softmax', 2 * ERROR, RATES),
}


class Cases(NamedTuple):
  """The cases of one split.

  Attributes:
    features: Features of the cases, float32 [N, M].
    targets: Outputs to learn, float32 [N, V].
    labels: Classes that the targets are computed from, int32 [N].
  """

  features: Any
  targets: Any
  labels: Any


@dataclasses.dataclass(frozen=True)
class Problem:
  """A learning problem: cases, targets and the criterion at which runs stop.

  Attributes:
    train: Training cases.
    test: Test cases.
    expert_output: Function that experts' outputs pass through; see
      `MixtureOptions`.
    error: Squared error at which a run stops: the mean of ||d - y||^2 over
      training cases, of the mixture's outputs y and the targets d.
    rates: Learning rates to choose from, ascending.
    classes: Names of the classes.
    description: Description of the targets in words.
  """

  train: Cases
  test: Cases
  expert_output: str
  error: float
  rates: tuple[float, ...]
  classes: tuple[str, ...]
  description: str

  def model(
    self, num_experts: int, loss: str, expert_hidden: int = 0
  ) -> AdaptiveMixture:
    """A mixture of the problem's sizes; see `MixtureOptions` for arguments."""
    mixture = MixtureOptions(
      loss=loss,
      num_experts=num_experts,
      expert_hidden=expert_hidden,
      expert_output=self.expert_output,
    )
    return AdaptiveMixture(
      AdaptiveOptions(
        vocab_size=self.train.targets.shape[-1],
        feature_shape=self.train.features.shape[1:],
        adaptive=mixture,
      )
    )


def problem(source: ClassSource, targets: str, error: float = 0.0) -> Problem:
  """The problem of learning a source's classes, with targets of one kind.

  - 'pairs' is one logistic output, 0 for the first and third class and 1 for
    the second and fourth. Runs stop at an error of 0.08.
  - 'linear_pairs' is one linear output with the same targets, so that distances
    can exceed 1, which those of logistic outputs cannot. Runs stop at 0.11.
  - 'one_hot' is a softmax over all classes. Runs stop at 0.16, since a softmax
    over two classes errs in both outputs where a logistic output errs in one.

  Args:
    source: Source of the cases.
    targets: Kind of the targets, a key of `TARGETS`.
    error: Squared error at which a run stops; 0 takes that of the kind.

  Raises:
    ValueError: There is no such kind, or the source has another number of
      classes than the four that pairs need.
  """
  if targets not in TARGETS:
    raise InputError(f'targets={targets!r} not in {list(TARGETS)}')
  kind = TARGETS[targets]
  one_hot = targets == 'one_hot'
  if not one_hot and len(source.classes) != 4:
    raise InputError(
      f'targets={targets!r} are of four classes; {source.name} has '
      f"{len(source.classes)}; use 'one_hot'"
    )

  def cases(split: str) -> Cases:
    features, labels = source.examples(split)
    targets = np.eye(len(source.classes), dtype=np.float32)[labels]
    if not one_hot:
      targets = (labels % 2).astype(np.float32)[:, None]
    return Cases(features.reshape(len(labels), -1), targets, labels)

  names = source.classes
  description = f'{len(names)} classes'
  if not one_hot:
    description = (
      f'[{names[0]}], [{names[2]}] against [{names[1]}], [{names[3]}]'
    )
    description += ', linear outputs' * (kind.expert_output == 'linear')
  splits = cases('train'), cases('validation')
  kind = kind._replace(error=error or kind.error)
  return Problem(*splits, *kind, names, description)
