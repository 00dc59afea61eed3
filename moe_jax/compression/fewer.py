"""Models with fewer experts: pruning, and the models that merging makes, too.

Pruning keeps the experts of the highest scores, with their weights in the
router. A score is the usage, the mean gate, or REAP's mean of gate times norm
of output (https://arxiv.org/abs/2510.13999). An expert that no calibration
token reaches has the score 0 and is pruned first; of equal scores the lower
index stays. A token that would choose a pruned expert takes the next of its
choices. For a token whose choices all stay:

- With gates that sum to one over the chosen experts, or that are each a
  sigmoid, nothing changes.
- With raw gates the softmax is over the experts that stay: a gate g becomes
  g / (1 - p), where p is the sum of the probabilities of the pruned experts. So
  the layer's output y becomes y / (1 - p).

Where a token chooses groups of experts first, all groups keep the same number.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.compression import calibration
from moe_jax.compression.calibration import SCORES, Usage, measure
from moe_jax.config import Option, unknown
from moe_jax.data import DataOptions
from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.retained import Retained
from moe_jax.models import ModelOptions, code_trees, expert_arrays
from moe_jax.models.expert_arrays import COLUMN, SparseLayer, sparse_layers
from moe_jax.models.layer_options import LayerOptions
from moe_jax.training.trained import Loaded

SHARE = Option(above=0, maximum=1)
Groups = tuple[tuple[int, ...], ...]


class SmallerLayer(NamedTuple):
  """A sparse layer with fewer experts.

  Attributes:
    groups: For each of the E' new experts the indices of the old experts that
      it is made of. An old expert in no group is pruned, with its column of the
      router's kernel. If none is pruned, the router keeps all columns, and a
      column leads to the new expert that its old expert became part of.
    arrays: The arrays of the layer that change, by path.
  """

  groups: Groups
  arrays: expert_arrays.Arrays

  @property
  def row(self) -> tuple[int, ...]:
    """The index of the new expert, for each old expert that is not pruned.

    Old experts are in order. If none is pruned, it is a row of `Retained.rows`.
    """
    pairs = (
      (old, new) for new, group in enumerate(self.groups) for old in group
    )
    return tuple(new for _, new in sorted(pairs))


class Calibrated(NamedTuple):
  """A run with its sparse layers and their statistics on some data.

  Attributes:
    run: The run.
    layers: The run's sparse layers, by index.
    usage: The statistics of the experts of each sparse layer.
  """

  run: Loaded
  layers: dict[int, SparseLayer]
  usage: dict[int, Usage]


def calibrated(
  run: Loaded, num_batches: int, options: DataOptions | None = None
) -> Calibrated:
  """Measures the experts of a run on batches of its training data.

  Args:
    run: The run.
    num_batches: The number of batches.
    options: The options of other data; None takes those of the run.

  Raises:
    ValueError: The model's experts cannot be merged or pruned, or
      `calibration.batches` refuses the data.
  """
  code_trees.check_plain(run.options.model, run.folder)
  layers = sparse_layers(run.model, run.variables)
  for layer in layers.values():
    check_layer(layer)
  batches = calibration.batches(run, num_batches, options)
  usage = measure(run.model, run.variables, batches)
  return Calibrated(run, layers, usage)


def check_layer(layer: SparseLayer) -> None:
  """Raises ValueError where experts of a layer cannot be merged or pruned."""
  if not layer.moe.router.has_columns:
    raise InputError(
      f'layer {layer.number}: {type(layer.moe.router).__name__} has no column '
      'for each expert, by which its tokens would choose among those that are '
      'left'
    )
  if layer.moe.retained.rows:
    raise InputError(
      f'layer {layer.number} has merged experts already; begin with the run '
      'that it was made of'
    )


def numbers(text: str, layers: Mapping[int, SparseLayer]) -> dict[int, int]:
  """The number of experts that each sparse layer keeps, read from a text.

  Args:
    text: One number for all layers, '4', or a number for each: '4,6,4'.
    layers: The sparse layers.

  Raises:
    ValueError: The text has no or too many numbers, or a number is not in
      [K, E].
  """
  entries = [entry.strip() for entry in text.split(',')]
  if not all(entry.isdigit() for entry in entries):
    raise InputError(f"experts={text!r} is neither a number nor '4,6,4'")
  if len(entries) == 1:
    entries *= len(layers)
  if len(entries) != len(layers):
    raise InputError(
      f'experts={text!r} has {len(entries)} numbers, and the model has the '
      f'sparse layers {list(layers)}; give one number, or one for each'
    )
  counts = dict(zip(layers, map(int, entries), strict=True))
  for number, count in counts.items():
    moe = layers[number].moe
    if not moe.num_selected <= count <= moe.num_experts:
      raise InputError(
        f'experts={text!r}: {count} in layer {number} is not in '
        f'[num_selected={moe.num_selected}, num_experts={moe.num_experts}]'
      )
  return counts


def numbers_by_share(
  share: float,
  scores: Mapping[int, np.ndarray],
  layers: Mapping[int, SparseLayer],
) -> dict[int, int]:
  """The number of experts that stay in each layer, by one threshold for all.

  Scores are divided by the largest of their layer, as in M-SMoE; the experts of
  the highest scores stay, whatever their layer, and at least K of each layer.
  Of equal scores that in the lower layer stays.

  Args:
    share: The share of all experts that stay, in (0, 1]; else ValueError.
    scores: The score of each expert, by layer.
    layers: The sparse layers.
  """
  if problem := SHARE.problem('share', share):
    raise InputError(problem)
  counts = {n: layer.moe.num_selected for n, layer in layers.items()}
  candidates = []
  for n, own in scores.items():
    ranked = np.sort(own / max(own.max(), 1e-30))[::-1]
    candidates += [(score, -n) for score in ranked[counts[n] :]]
  total = sum(map(len, scores.values()))
  num_extra = max(math.floor(share * total + 0.5) - sum(counts.values()), 0)
  for _, negative in sorted(candidates, reverse=True)[:num_extra]:
    counts[-negative] += 1
  return counts


def check_groups(
  layers: Mapping[int, SparseLayer], counts: Mapping[int, int]
) -> None:
  """Raises ValueError if a layer's groups cannot keep equally many experts.

  `counts` has the number of experts that stay in each layer; groups are those
  of a router whose tokens choose groups of experts first.
  """
  for n, layer in layers.items():
    if counts[n] % (num_groups := _groups(layer)):
      raise InputError(
        f'layer {n}: {counts[n]} experts that stay are no multiple of '
        f'expert_groups={num_groups}, of which each keeps as many'
      )


def in_groups(
  layers: Mapping[int, SparseLayer], counts: Mapping[int, int]
) -> dict[int, int]:
  """The `counts` of experts that stay, by layer, rounded up to fit the groups.

  They become multiples of the number of groups from which tokens choose first.
  """
  return {
    n: -(-counts[n] // _groups(layer)) * _groups(layer)
    for n, layer in layers.items()
  }


def _groups(layer: SparseLayer) -> int:
  """The number of a router's groups of experts; 1 if it has no groups."""
  return getattr(layer.moe.router, 'expert_groups', 1)


def prune(
  original: Calibrated, counts: Mapping[int, int], *, score: str = 'reap'
) -> dict[int, SmallerLayer]:
  """The layers of a run with the experts of the highest scores, by index.

  Args:
    original: The run with the statistics of its experts.
    counts: The number of experts that stay in each sparse layer.
    score: One of `calibration.SCORES`.

  Raises:
    ValueError: The score is unknown, or groups of experts would differ in their
      size.
  """
  if score not in SCORES:
    raise unknown('score', score, SCORES)
  check_groups(original.layers, counts)
  new_layers = {}
  for n, layer in original.layers.items():
    num_groups = _groups(layer)
    scores = SCORES[score](original.usage[n]).reshape(num_groups, -1)
    order = np.argsort(-scores, axis=1, kind='stable')
    first = np.arange(num_groups)[:, None] * scores.shape[1]
    left = (first + order[:, : counts[n] // num_groups]).ravel()
    new_layers[n] = only(layer, sorted(left.tolist()))
  return new_layers


def only(layer: SparseLayer, experts: list[int]) -> SmallerLayer:
  """The layer with some experts alone, and their columns of the router.

  `experts` are the indices of the experts that stay, ascending.

  Raises:
    ValueError: Fewer experts would stay than a token chooses, or groups of
      experts would differ in their size.
  """
  num_groups, K = _groups(layer), layer.moe.num_selected
  if len(experts) < K:
    raise InputError(
      f'layer {layer.number} would keep {len(experts)} experts, and a token '
      f'chooses {K}'
    )
  index = np.array(experts)
  group_size = layer.moe.num_experts // num_groups
  sizes = np.bincount(index // group_size, minlength=num_groups)
  if sizes.min() < sizes.max():
    raise InputError(
      f'layer {layer.number}: the groups of experts would keep '
      f'{sizes.tolist()} experts; tokens choose groups that are equally large'
    )
  arrays = {path: x[index] for path, x in layer.experts.items()}
  for path, x in layer.columns.items():
    arrays[path] = jnp.take(x, index, layer.axes[path].index(COLUMN))
  return SmallerLayer(tuple((e,) for e in experts), arrays)


def smaller(
  run: Loaded, new_layers: Mapping[int, SmallerLayer]
) -> tuple[ModelOptions, dict[str, Any]]:
  """The options and the variables of a run's model with fewer experts.

  With the router column of a pruned expert, the bias is removed that balances
  the expert's load, if the router has such biases.

  Args:
    run: The run.
    new_layers: The new sparse layers by index; the other layers stay as they
      are.

  Raises:
    ValueError: A layer would have merged experts, and also fewer router columns
      than another layer.
  """
  model = run.model
  layers = sparse_layers(model, run.variables)

  def change(first: int, half: LayerOptions) -> MoeOptions:
    counts, rows = {}, dict(half.moe.retained.rows)
    for n, layer in layers.items():
      if not first <= n < first + half.num_layers:
        continue
      counts[layer.in_stack] = E = layer.moe.num_experts
      if (new := new_layers.get(n)) is None or len(new.groups) == E:
        continue
      if len(new.row) == E:
        rows[layer.in_stack] = new.row
      else:
        counts[layer.in_stack] = len(new.groups)
    if not counts:
      return half.moe
    most = max(counts.values())
    uneven = {i: count for i, count in counts.items() if count < most}
    retained = Retained.of(uneven, rows)
    return dataclasses.replace(half.moe, num_experts=most, retained=retained)

  options = expert_arrays.with_moes(run.options.model, change)
  changes = {
    n: new.arrays
    for n, new in new_layers.items()
    if len(new.groups) < layers[n].moe.num_experts
  }
  new_model = options.build(run.options.sharding.rules)
  variables = expert_arrays.assembled(model, run.variables, new_model, changes)
  return options, variables


def without(run: Loaded, lost: Mapping[int, Collection[int]]) -> Loaded:
  """The run in memory without some experts, to see what they contribute.

  A token that would choose a removed expert takes the next of its choices.

  Args:
    run: The run.
    lost: The indices of the experts to remove, by the index of their layer.

  Raises:
    ValueError: A layer is not sparse, lacks the expert, has merged experts, or
      would keep fewer than a token chooses or groups of unequal size.
  """
  layers = sparse_layers(run.model, run.variables)
  new_layers = {}
  for number, lost_experts in lost.items():
    if number not in layers:
      raise InputError(f'layer {number} is not sparse; {[*layers]} are')
    layer, lost_experts = layers[number], set(lost_experts)
    check_layer(layer)
    E = layer.moe.num_experts
    if missing := sorted(lost_experts - set(range(E))):
      raise InputError(f'layer {number} has no experts {missing}, only {E}')
    new_layers[number] = only(layer, sorted(set(range(E)) - lost_experts))
  options, variables = smaller(run, new_layers)
  return run._replace(
    options=run.options._replace(model=options),
    model=options.build(run.options.sharding.rules),
    variables=variables,
  )
