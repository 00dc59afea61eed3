"""Groups of similar experts, each of which becomes one expert.

The similarity is that of mean outputs on data (HC-SMoE), of weights, or of
router columns: their weights, unlike the router logits on data of M-SMoE.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist, squareform

from moe_jax.compression.align import aligned
from moe_jax.compression.usage import SCORES, Usage
from moe_jax.models.expert_arrays import COLUMN, SparseLayer
from moe_jax.options import unknown

Groups = tuple[tuple[int, ...], ...]


class Similarity(NamedTuple):
  """A property by which experts are compared.

  Attributes:
    features: The function features(layer, usage) that returns rows [E, N], one
      for each expert.
    metric: The name of the distance of two rows in scipy's `pdist`.
    meaning: A phrase for the help of commands.
  """

  features: Callable[[SparseLayer, Usage], np.ndarray]
  metric: str
  meaning: str


def _router_columns(layer: SparseLayer, usage: Usage) -> np.ndarray:
  del usage
  columns = [
    np.moveaxis(np.asarray(x, np.float64), layer.axes[p].index(COLUMN), 0)
    for p, x in layer.columns.items()
    if x.ndim > 1
  ]
  return np.concatenate([x.reshape(len(x), -1) for x in columns], axis=1)


def _weights(layer: SparseLayer, usage: Usage) -> np.ndarray:
  experts = {
    path: np.asarray(x, np.float32) for path, x in layer.experts.items()
  }
  aligned_experts = aligned(experts, int(np.argmax(usage.choices)), layer.axes)
  return np.concatenate(
    [x.reshape(len(x), -1) for x in aligned_experts.values()], axis=1
  )


def _outputs(layer: SparseLayer, usage: Usage) -> np.ndarray:
  del layer
  return usage.mean_output


SIMILARITIES: Mapping[str, Similarity] = {
  'outputs': Similarity(
    _outputs, 'euclidean', 'mean outputs over all calibration tokens (HC-SMoE)'
  ),
  'weights': Similarity(
    _weights, 'euclidean', 'weights, aligned to those of the most used expert'
  ),
  'router': Similarity(
    _router_columns, 'cosine', "weights of the router's columns"
  ),
}


def distances(
  layer: SparseLayer, usage: Usage, group_by: str
) -> Float[np.ndarray, 'E E']:
  """The distance of each two experts of a layer.

  Raises:
    ValueError: The similarity is unknown.
  """
  if group_by not in SIMILARITIES:
    raise unknown('group_by', group_by, SIMILARITIES)
  similarity = SIMILARITIES[group_by]
  rows = similarity.features(layer, usage)
  # A column of zeros has no direction; its distance to any other is 1.
  metric: Any = similarity.metric
  return squareform(np.nan_to_num(pdist(rows, metric), nan=1.0))


def clusters(
  distance: Float[np.ndarray, 'E E'], usage: Usage, num_groups: int
) -> Groups:
  """Exactly that many clusters of average linkage (HC-SMoE).

  Args:
    distance: The distance of each two experts.
    usage: Not used; an argument of every function in `GROUPINGS`.
    num_groups: E', in [1, E].
  """
  del usage
  E = len(distance)
  if num_groups == E or E == 1:
    return tuple((e,) for e in range(E))
  linkage = hierarchy.linkage(squareform(distance, checks=False), 'average')
  labels = hierarchy.cut_tree(linkage, n_clusters=num_groups)[:, 0]
  return _in_order(labels)


def cores(
  distance: Float[np.ndarray, 'E E'], usage: Usage, num_groups: int
) -> Groups:
  """The most used experts, each with the others that are nearest to it.

  Source: step 3 of M-SMoE, https://arxiv.org/abs/2310.01334. Ties go to the
  lower number.
  """
  most_used = np.argsort(-SCORES['usage'](usage), kind='stable')[:num_groups]
  labels = np.argmin(distance[:, np.sort(most_used)], axis=1)
  labels[np.sort(most_used)] = np.arange(num_groups)
  return _in_order(labels)


GROUPINGS = {'clusters': clusters, 'cores': cores}


def _in_order(labels: np.ndarray) -> Groups:
  """The groups, ordered by their lowest member."""
  groups = [tuple(np.flatnonzero(labels == g).tolist()) for g in set(labels)]
  return tuple(sorted(groups))
