"""Measures from counts of choices: information, pairs, repeats, evenness.

All of them are functions of tables of counts. Entropies and information are in
nats. Not here: the counts (`route_counts.py`, `route_sums.py`).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.stats import random_table

from moe_jax.errors import InputError

NUM_SHUFFLES = 8
_PERCENTILES = (0, 10, 25, 50, 75, 90, 100)


def entropy(counts: Num[np.ndarray, '...']) -> float:
  """The entropy in nats of the distribution that counts have, 0 for none."""
  counts = np.asarray(counts)
  counts = counts[counts > 0].astype(np.float64)
  if not counts.size:
    return 0.0
  total = counts.sum()
  return max(float(np.log(total) - counts @ np.log(counts) / total), 0.0)


def mutual_information(table: Num[np.ndarray, 'labels E']) -> float:
  """The mutual information in nats of the label and the expert of a choice.

  It is estimated from the shares of counts alone, so that it is too high by
  about (labels - 1) (E - 1) / (2 N) if the two are independent.
  """
  mutual = entropy(table.sum(0)) + entropy(table.sum(1)) - entropy(table)
  return max(mutual, 0.0)  # rounding may leave less than 0


class Information(NamedTuple):
  """The information of a label on the expert that is chosen.

  Attributes:
    choices: Number of choices.
    labels: Number of labels that occur.
    entropy: Entropy of the experts, in nats.
    mutual: Mutual information of label and expert, in nats.
    shuffled: The same of shuffled labels, averaged over shuffles: what chance
      gives with as many choices.
    deviation: The standard deviation over shuffles.
    accuracy: Share of choices that are the most frequent expert of their label,
      counted on the choices that made it the most frequent.
    accuracy_shuffled: The same of shuffled labels, averaged over shuffles.
    base_rate: Share of choices of the most frequent expert of all.
  """

  choices: int
  labels: int
  entropy: float
  mutual: float
  shuffled: float
  deviation: float
  accuracy: float
  accuracy_shuffled: float
  base_rate: float

  @property
  def net(self) -> float:
    """Mutual information less that of shuffled labels, in nats."""
    return self.mutual - self.shuffled

  @property
  def fraction(self) -> float:
    """`net` as a fraction of the entropy of the experts; NaN if that is 0."""
    return self.net / self.entropy if self.entropy else math.nan

  @property
  def adjusted(self) -> float:
    """`net` as a fraction of the most that it can be with these counts.

    It is 1 if the label determines the expert, however few choices there are,
    and 0 on average if the two are independent; NaN where nothing is left to
    say. Source: the adjusted mutual information of Vinh, Epps and Bailey (2010)
    with the entropy of the experts as the upper bound.
    """
    maximum = self.entropy - self.shuffled
    return self.net / maximum if maximum > 1e-12 else math.nan


def information(
  table: Int[np.ndarray, 'labels E'],
  rng: np.random.Generator,
  num_shuffles: int = NUM_SHUFFLES,
) -> Information:
  """The information of labels on experts; labels are shuffled by choice.

  A table with the same sums of rows and columns is drawn at random, which is
  exactly the table of shuffled labels. Labels that neighbours share, such as
  the domain of a document, are better shuffled over documents; see
  `information_of` and `route_labels.LabelledDocuments`.

  Args:
    table: Number of choices of each expert with each label.
    rng: The generator of random numbers.
    num_shuffles: Number of shuffles.

  Raises:
    ValueError: `num_shuffles` is less than 1.
  """
  if num_shuffles < 1:
    raise InputError(f'num_shuffles={num_shuffles} must be at least 1')
  table = table[table.sum(1) > 0]
  table = table[:, table.sum(0) > 0]
  shuffles: Iterable[np.ndarray] = [table]
  if min(table.shape, default=0) > 1:
    rows, columns = table.sum(1), table.sum(0)
    shuffles = (
      random_table.rvs(rows, columns, random_state=rng)
      for _ in range(num_shuffles)
    )
  return information_of(table, shuffles)


def information_of(
  table: Int[np.ndarray, 'labels E'], shuffles: Iterable[np.ndarray]
) -> Information:
  """The information of labels on experts, and that of shuffled tables.

  Args:
    table: Number of choices of each expert with each label.
    shuffles: Such tables with shuffled labels, one at a time.
  """
  chance = [(mutual_information(t), _best_guess(t)) for t in shuffles]
  mutual, accuracy = np.array(chance).T
  total = int(table.sum())
  return Information(
    choices=total,
    labels=int((table.sum(1) > 0).sum()),
    entropy=entropy(table.sum(0)),
    mutual=mutual_information(table),
    shuffled=float(mutual.mean()),
    deviation=float(mutual.std(ddof=1)) if len(mutual) > 1 else 0.0,
    accuracy=_best_guess(table),
    accuracy_shuffled=float(accuracy.mean()),
    base_rate=float(table.sum(0).max() / total) if total else math.nan,
  )


def _best_guess(table: Int[np.ndarray, 'labels E']) -> float:
  total = table.sum()
  return float(table.max(1).sum() / total) if total else math.nan


def expected_pairs(
  pairs: Int[np.ndarray, 'E E'], num_rounds: int = 500
) -> Float[np.ndarray, 'E E']:
  """The pairs that tokens would choose if partners did not matter.

  Each expert keeps its number of partners, and no token chooses an expert
  twice: the counts are w_a w_b for a != b, with the w that give the same sums
  of rows (quasi-independence, found by iterative proportional fitting). With an
  even load they are all equal. Without the second condition even random choices
  would seem to avoid each other.

  Args:
    pairs: Symmetric counts of pairs, 0 on the diagonal.
    num_rounds: The most rounds of fitting.
  """
  row_sums = pairs.sum(1).astype(np.float64)
  weight = np.sqrt(row_sums / max(row_sums.mean(), 1e-300))
  expected = np.zeros(pairs.shape)
  for _ in range(num_rounds):
    expected = np.outer(weight, weight)
    np.fill_diagonal(expected, 0)
    sums = expected.sum(1)
    ratio = np.divide(row_sums, sums, out=np.ones_like(sums), where=sums > 0)
    if np.abs(ratio[row_sums > 0] - 1).max(initial=0) < 1e-9:
      break
    weight *= np.sqrt(ratio)
  return expected


def relative_entropy(
  counts: Num[np.ndarray, '...'], expected: Num[np.ndarray, '...']
) -> float:
  """Kullback-Leibler divergence in nats of counts from expected counts."""
  occurs = counts > 0
  if not occurs.any():
    return 0.0
  p, q = counts[occurs] / counts.sum(), expected[occurs] / expected.sum()
  return float(max((p * np.log(p / q)).sum(), 0.0))


def independent(
  table: Num[np.ndarray, 'rows E'],
) -> Float[np.ndarray, 'rows E']:
  """The counts that rows and columns with these sums have if independent."""
  total = max(float(table.sum()), 1e-300)
  return np.outer(table.sum(1), table.sum(0)) / total


def uniform_repeats(num_experts: int, num_selected: int) -> tuple[float, float]:
  """The shares of repeats if all sets of experts were equally likely.

  Returns:
    The share of pairs of tokens with the same first choice, 1 / E, and that of
    pairs with an expert in common, 1 - C(E - K, K) / C(E, K): 12.5 % and 46.4 %
    for two of eight experts, as in section 5 of arXiv:2401.04088.

  Raises:
    ValueError: A token cannot choose that many experts.
  """
  E, K = num_experts, num_selected
  if not 1 <= K <= E:
    raise InputError(f'num_selected={K} not in [1, num_experts={E}]')
  return 1 / E, 1 - math.comb(E - K, K) / math.comb(E, K)


def load_percentiles(load: Num[np.ndarray, 'E']) -> dict[int, float]:
  """Percentiles over experts of the load, over the mean load; NaN if empty."""
  mean = np.mean(load)
  if not mean:
    return dict.fromkeys(_PERCENTILES, math.nan)
  values = np.percentile(np.asarray(load) / mean, _PERCENTILES)
  return dict(zip(_PERCENTILES, map(float, values), strict=True))
