"""Merging of similar experts: each group of a layer becomes one expert.

M-SMoE (https://arxiv.org/abs/2310.01334) and HC-SMoE
(https://arxiv.org/abs/2410.08589) differ in three settings: the similarity, the
rule of grouping, and the number of experts of each layer. As in both papers,
routers still have a logit for each old expert, and tokens that choose an old
expert are served by its merged one. A merged expert is the mean of its group,
aligned to the most used expert of the group and weighted by usage. An expert
that no calibration token reaches has the weight 0 in its group; if no expert of
a group is reached, all have the same weight.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.cluster import hierarchy
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist, squareform

from moe_jax.compression.calibration import SCORES, Usage
from moe_jax.compression.fewer import Calibrated, Groups, SmallerLayer
from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.layers.parameters import Names
from moe_jax.models.description import Path
from moe_jax.models.expert_arrays import COLUMN, Arrays, SparseLayer

HIDDEN = 'expert_mlp'


def merge(
  original: Calibrated,
  counts: Mapping[int, int],
  *,
  group_by: str = 'outputs',
  rule: str = 'clusters',
) -> dict[int, SmallerLayer]:
  """The layers of a run with groups of experts merged, by index.

  Args:
    original: The run with the statistics of its experts.
    counts: The number of experts that stay in each sparse layer.
    group_by: One of `SIMILARITIES`.
    rule: One of `GROUPINGS`.

  Raises:
    ValueError: The similarity or the rule is unknown, or the experts have no
      hidden units.
  """
  if rule not in GROUPINGS:
    raise unknown('rule', rule, GROUPINGS)
  new_layers = {}
  for n, layer in original.layers.items():
    usage = original.usage[n]
    distance = distances(layer, usage, group_by)
    groups = GROUPINGS[rule](distance, usage, counts[n])
    new_layers[n] = merged(layer, usage, groups)
  return new_layers


def merged(layer: SparseLayer, usage: Usage, groups: Groups) -> SmallerLayer:
  """The layer with each group of experts merged into one expert.

  `groups` has the indices of the experts of each group, and `usage` gives their
  weights. A group of a single expert is copied bit for bit.
  """
  experts = {path: np.asarray(x) for path, x in layer.experts.items()}
  means = {path: [] for path in experts}
  for index in map(list, groups):
    if len(index) == 1:
      for path, x in experts.items():
        means[path].append(x[index[0]])
      continue
    group = {path: x[index] for path, x in experts.items()}
    weights = usage.choices[index]
    if not weights.sum():
      weights = np.ones(len(index))
    weights = weights / weights.sum()
    reference = int(np.argmax(weights))
    for path, x in aligned(group, reference, layer.axes).items():
      wide = np.moveaxis(x, 0, -1).astype(np.float64)
      means[path].append((wide @ weights).astype(x.dtype))
  arrays = {path: jnp.asarray(np.stack(x)) for path, x in means.items()}
  return SmallerLayer(groups, arrays)


def aligned(
  experts: Arrays, reference: int, axes: Mapping[Path, Names]
) -> dict[Path, np.ndarray]:
  """The experts with hidden units in the order that best fits a reference.

  A feed-forward computes the same whatever the order of its hidden units, so
  experts are compared and averaged after a permutation of these units: step 1
  of M-SMoE.

  The fit of two units is the sum of the products of all their weights. M-SMoE's
  code takes the weights of the first and last kernel alone, but gated experts
  have a third kernel, and there may be biases.

  Args:
    experts: The parameters of experts, [E, ...], by path.
    reference: The index of the expert that all others are aligned to.
    axes: The logical axes of each parameter; hidden units are 'expert_mlp'.

  Raises:
    ValueError: The parameters have no hidden units.
  """
  hidden = {p: axes[p].index(HIDDEN) for p in experts if HIDDEN in axes[p]}
  if not hidden:
    raise InputError(
      f'the experts have the parameters {["/".join(p) for p in experts]}, '
      'none of which has hidden units; only feed-forward experts are aligned'
    )
  fits: Any = 0.0  # [E, F, F]
  for path, axis in hidden.items():
    rows = np.moveaxis(np.asarray(experts[path], np.float32), axis, 1)
    rows = rows.reshape(*rows.shape[:2], -1)  # [E, F, N]
    fits = fits + rows[reference] @ rows.swapaxes(1, 2)
  orders = [linear_sum_assignment(fit, maximize=True)[1] for fit in fits]
  orders[reference] = np.arange(len(orders[reference]))
  arrays = dict(experts)
  for path, axis in hidden.items():
    pairs = zip(experts[path], orders, strict=True)
    arrays[path] = np.stack([np.take(x, i, axis - 1) for x, i in pairs])
  return arrays


def _router_columns(layer: SparseLayer, _: Usage) -> np.ndarray:
  columns = [
    np.moveaxis(np.asarray(x, np.float64), layer.axes[p].index(COLUMN), 0)
    for p, x in layer.columns.items()
    if x.ndim > 1
  ]
  return np.concatenate([x.reshape(len(x), -1) for x in columns], axis=1)


def _weights(layer: SparseLayer, usage: Usage) -> np.ndarray:
  experts = {p: np.asarray(x, np.float32) for p, x in layer.experts.items()}
  arrays = aligned(experts, int(np.argmax(usage.choices)), layer.axes).values()
  return np.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1)


# For each similarity, the function from a layer and its statistics to the N
# features of each expert, [E, N], by which experts are compared, and the name
# of scipy's distance of two experts' features (see `pdist`). 'router' compares
# columns of the router's kernel, where M-SMoE compares router logits on data.
SIMILARITIES: Mapping[str, tuple[Callable[..., np.ndarray], Any]] = {
  'outputs': (lambda _, usage: usage.mean_output, 'euclidean'),
  'weights': (_weights, 'euclidean'),
  'router': (_router_columns, 'cosine'),
}


def distances(
  layer: SparseLayer, usage: Usage, group_by: str
) -> Float[np.ndarray, 'E E']:
  """The distances between all pairs of experts of a layer.

  `group_by` is a key of `SIMILARITIES`; `usage` has the experts' statistics.

  Raises:
    ValueError: The similarity is unknown.
  """
  if group_by not in SIMILARITIES:
    raise unknown('group_by', group_by, SIMILARITIES)
  features, metric = SIMILARITIES[group_by]
  # A router column of zeros has no direction; its cosine distance is set to 1.
  rows = pdist(features(layer, usage), metric)
  return squareform(np.nan_to_num(rows, nan=1.0))


def clusters(
  distance: Float[np.ndarray, 'E E'], usage: Usage, num_groups: int
) -> Groups:
  """Exactly `num_groups` groups of experts, by average linkage (HC-SMoE).

  Args:
    distance: The distances between all pairs of experts.
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
  """Groups of the most used experts, each with the experts nearest to it.

  Source: step 3 of M-SMoE, https://arxiv.org/abs/2310.01334. Ties go to the
  lower index.

  Args:
    distance: The distances between all pairs of experts.
    usage: The statistics of the experts, by which the most used are found.
    num_groups: E', in [1, E].
  """
  most_used = np.argsort(-SCORES['usage'](usage), kind='stable')[:num_groups]
  labels = np.argmin(distance[:, np.sort(most_used)], axis=1)
  labels[np.sort(most_used)] = np.arange(num_groups)
  return _in_order(labels)


GROUPINGS = {'clusters': clusters, 'cores': cores}


def _in_order(labels: np.ndarray) -> Groups:
  """The groups of experts with equal labels [E], ordered by lowest index."""
  groups = [tuple(np.flatnonzero(labels == g).tolist()) for g in set(labels)]
  return tuple(sorted(groups))
