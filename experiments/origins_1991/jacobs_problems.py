"""What the systems of 1991 learn: cases, targets, and when a run may stop.

Not here: how they learn it (`jacobs_runs.py`).
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data import ClassSource
from moe_jax.models.adaptive import (
  AdaptiveMixture,
  AdaptiveOptions,
  MixtureOptions,
)

RATES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
# The paper's criterion.
ERROR = 0.08


class Kind(NamedTuple):
  """A kind of targets; see `Problem` for what it says."""

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
  """Cases of one split.

  Attributes:
    features: float32 [N, M].
    targets: float32 [N, V].
    labels: int32 [N], the classes that the targets are made from.
  """

  features: Any
  targets: Any
  labels: Any


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is to be learned.

  Attributes:
    train: Cases to learn from.
    test: Cases that are asked about at the end.
    expert_output: Function that experts' outputs pass through; see
      `MixtureOptions`.
    error: The criterion: the mean over training cases of the squared error of
      the blend, ||d - y||^2, at which a run stops.
    rates: Learning rates to choose from, ascending.
    classes: Names of the classes.
    says: What the targets are, in words.
  """

  train: Cases
  test: Cases
  expert_output: str
  error: float
  rates: tuple[float, ...]
  classes: tuple[str, ...]
  says: str

  def model(
    self, num_experts: int, loss: str, expert_hidden: int = 0
  ) -> AdaptiveMixture:
    """A mixture that can learn it; see `MixtureOptions`."""
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
  """The source's classes as targets of one of three kinds.

  - 'pairs' is one logistic output, 0 for the first and third class and 1 for
    the second and fourth, until an error of 0.08.
  - 'linear_pairs' is one linear output for the same, until 0.11: all distances
    are below 1 where outputs are logistic, and here are not.
  - 'one_hot' is a softmax over classes, until 0.16, since a softmax of two errs
    in both its outputs where a logistic output errs in one.

  Args:
    source: Where the cases come from.
    targets: The kind, a key of `TARGETS`.
    error: The criterion; 0 stands for that of the kind.

  Raises:
    ValueError: There is no such kind, or pairs are wanted of another number of
      classes than four.
  """
  if targets not in TARGETS:
    raise ValueError(f'targets={targets!r} not in {list(TARGETS)}')
  kind = TARGETS[targets]
  one_hot = targets == 'one_hot'
  if not one_hot and len(source.classes) != 4:
    raise ValueError(
      f'targets={targets!r} are of four classes; {source.name} has '
      f"{len(source.classes)}; use 'one_hot'"
    )

  def cases(split: str) -> Cases:
    features, labels = source.examples(split)
    wanted = np.eye(len(source.classes), dtype=np.float32)[labels]
    if not one_hot:
      wanted = (labels % 2).astype(np.float32)[:, None]
    return Cases(features.reshape(len(labels), -1), wanted, labels)

  names = source.classes
  says = f'{len(names)} classes'
  if not one_hot:
    says = f'[{names[0]}], [{names[2]}] against [{names[1]}], [{names[3]}]'
    says += ', linear outputs' * (kind.expert_output == 'linear')
  splits = cases('train'), cases('validation')
  kind = kind._replace(error=error or kind.error)
  return Problem(*splits, *kind, names, says)
