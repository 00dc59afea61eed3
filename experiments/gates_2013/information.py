"""Mutual information of gates and a label, in nats.

An example draws an expert e with its gates as probabilities. For labels c of
probability p(c),

    p(e | c) = mean of the gates of the examples of c
    I(e; c)  = H(sum_c p(c) p(e | c)) - sum_c p(c) H(p(e | c))

The information is 0 where all labels have the same mean gates, and at most
ln E. Means over few examples deviate from their expectation, so that the
estimate is above 0 even where gates do not depend on the label. This bias is
estimated with the same gates and shuffled labels. The samples are images, not
pairs of image and place, since the gates of one image at its places are
correlated.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Number of shuffles of the labels over which the bias is averaged.
SHUFFLES = 20
# Share of all gates above which an expert counts as in use.
USED = 0.01


class Information(NamedTuple):
  """Mutual information of gates and a label, in nats.

  Attributes:
    measured: The estimate, without correction of its bias.
    by_chance: The mean estimate for shuffled labels, which is its bias.
  """

  measured: float
  by_chance: float

  @property
  def excess(self) -> float:
    """The estimate less its bias; it may be below 0."""
    return self.measured - self.by_chance


def entropy(p: Float[np.ndarray, '... E']) -> np.ndarray:
  """The entropy over the last axis, in nats; 0 log 0 is 0."""
  return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


def mutual_information(
  conditional: Float[np.ndarray, 'C E'], weight: Float[np.ndarray, ' C']
) -> float:
  """The mutual information I(e; c), from p(e | c) and p(c)."""
  mean = weight @ conditional
  return float(entropy(mean) - weight @ entropy(conditional))


def by_class(
  gates: Float[np.ndarray, 'N P E'], labels: Int[np.ndarray, ' N']
) -> np.ndarray:
  """Mean gates p(e | class), averaged over all places; [classes, E]."""
  mean = gates.mean(1)
  return np.stack([mean[labels == c].mean(0) for c in np.unique(labels)])


def about_class(
  gates: Float[np.ndarray, 'N P E'],
  labels: Int[np.ndarray, ' N'],
  seed: int = 0,
) -> Information:
  """Information of the gates of N images at P places about the class."""
  _, counts = np.unique(labels, return_counts=True)
  weight, rng = counts / len(labels), np.random.default_rng(seed)

  def class_information(labels):
    return mutual_information(by_class(gates, labels), weight)

  chance = [class_information(rng.permutation(labels)) for _ in range(SHUFFLES)]
  return Information(class_information(labels), float(np.mean(chance)))


def about_place(
  gates: Float[np.ndarray, 'N P E'], seed: int = 0
) -> Information:
  """Information of the gates of N images, at all P places, about the place."""
  N, P, _ = gates.shape
  weight, rng = np.full(P, 1 / P), np.random.default_rng(seed)
  chance = []
  for _ in range(SHUFFLES):
    order = rng.permuted(np.tile(np.arange(P), (N, 1)), axis=1)
    shuffled = np.take_along_axis(gates, order[..., None], axis=1)
    chance.append(mutual_information(shuffled.mean(0), weight))
  measured = mutual_information(gates.mean(0), weight)
  return Information(measured, float(np.mean(chance)))
