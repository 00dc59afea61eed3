"""Dense feed-forwards made of a sparse layer's experts, concatenated.

By the rule of https://arxiv.org/abs/2605.28207, the N experts of the highest
conditional probability are concatenated into one feed-forward of N times their
width. Its output is divided by N, since a router would have weighted each of
them by about 1/N. An expert's conditional probability is its mean gate over the
tokens that it serves. If the N experts served all tokens with gates of 1/N,
the dense layer computes what the sparse layer did.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import calibration
from moe_jax.compression.extract import as_one
from moe_jax.devices import fetch
from moe_jax.errors import InputError
from moe_jax.layers.block import BlockConfig
from moe_jax.layers.experts import SCOPE
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models import Model
from moe_jax.models.trees import flatten, unflatten
from moe_jax.routing import Routing
from moe_jax.shapes import Array, Float, Leaf, PRNGKey


def gate_sums(
  routing: Routing,
) -> tuple[Float[Array, ' E'], Float[Array, ' E']]:
  """Each expert's sum of gates, and number of tokens that it serves, as [E].

  `rank` takes these, of one layer, summed over batches.
  """
  gates = routing.token_gates()
  return gates.sum((0, 1)), (gates > 0).sum((0, 1)).astype(gates.dtype)


def rank(
  gates: Float[np.ndarray, ' E'], tokens: Float[np.ndarray, ' E']
) -> tuple[int, ...]:
  """The indices of experts by falling conditional probability.

  `gates` has the sum of each expert's gates, and `tokens` the number of tokens
  that it serves. Ties go to the lower index; experts that serve no token are
  last.
  """
  probability = np.where(tokens > 0, gates / np.maximum(tokens, 1), -1.0)
  return tuple(np.argsort(-probability, kind='stable').tolist())


def best_experts(
  model: Model,
  source: Model,
  variables: Mapping[str, Any],
  batches: Iterable[Mapping[str, Leaf]],
) -> dict[int, tuple[int, ...]]:
  """The experts of each sparse layer that a dense feed-forward is made of.

  Their number is the width of the dense model's feed-forward divided by the
  width of an expert: K for a dense twin, or another number. The result has
  their indices by the index of the layer, the best expert first.

  Args:
    model: The dense model.
    source: The sparse model.
    variables: The variables of the sparse model.
    batches: The batches of data, at least one, on which experts are ranked.

  Raises:
    ValueError: The sparse model has no experts, or shared ones; or a layer's
      width, activation or biases in the dense model do not fit its experts.
  """
  counts = {
    layer: _num_experts(model, source, layer)
    for layer in source.stacks.sparse_layers
  }
  if not counts:
    raise InputError('the teacher has no sparse layers, so no experts')

  @jax.jit
  def measure(variables, batch):
    tokens = calibration.capture(source, variables, batch)
    return {layer: gate_sums(x.routing) for layer, x in tokens.items()}

  sums = [fetch(measure(variables, batch)) for batch in batches]
  total = jax.tree.map(lambda *x: np.sum(x, 0, np.float64), *sums)
  return {layer: rank(*total[layer])[:n] for layer, n in counts.items()}


def concatenated(
  model: Model,
  source: Model,
  experts: Mapping[int, tuple[int, ...]],
  convert: Callable[[Any, PRNGKey], dict[str, Any]],
  params: Mapping[str, Any],
  key: PRNGKey,
) -> dict[str, Any]:
  """The parameters of the dense model; a pure function, to be jitted.

  Args:
    model: The dense model.
    source: The sparse model.
    experts: The indices of the experts of each sparse layer that are
      concatenated, by layer.
    convert: A function from `params` and a key to all parameters of the dense
      model; the feed-forwards that are made of experts replace those that the
      function returns.
    params: The parameters of the sparse model, unboxed.
    key: The key that is given to `convert`.
  """
  layers = source.stacks.layer_trees(params)
  joined = {
    layer: as_one(
      layers[layer]['moe'][SCOPE],
      jnp.array(numbers),
      jnp.full(len(numbers), 1 / len(numbers)),
    )
    for layer, numbers in experts.items()
  }
  arrays = flatten(convert(params, key))
  for path, stacked in arrays.items():
    place = model.stacks.place_of(path)
    if place is None or place.name[0] != 'ffn':
      continue
    for i, layer in enumerate(place.numbers):
      if layer in joined:
        array = joined[layer][place.name[-1]].astype(stacked.dtype)
        arrays[path] = arrays[path].at[i].set(array)
  return unflatten(arrays)


def _num_experts(model: Model, source: Model, layer: int) -> int:
  """The number of experts that together are as wide as a dense feed-forward.

  Args:
    model: The dense model, whose feed-forward it is.
    source: The sparse model, whose experts they are.
    layer: The index of the layer, in both models.

  Raises:
    ValueError: No number of experts has that width, a layer has a shared
      expert, activations or biases differ, or the new layer is not dense.
  """
  moe = source.stacks.moe_of(layer)
  if moe.shared_expert.hidden:
    raise InputError(
      f'layer {layer} of the teacher has a shared expert, which no student '
      'begins from'
    )
  if layer in model.stacks.sparse_layers:
    raise InputError(f'layer {layer} of the student is not dense')
  (block, twin), (source_block, _) = _block(model, layer), _block(source, layer)
  dense = FfnLayer(twin.twin().ffn if twin else block.ffn, block.shared)
  expert = FfnLayer(moe.expert.twin(1).ffn, source_block.shared)
  kinds = [
    (x.options.activation, x.use_bias, x.gate_bias) for x in (expert, dense)
  ]
  if kinds[0] != kinds[1]:
    raise InputError(
      f'layer {layer}: experts have (activation, bias, bias of gates)='
      f"{kinds[0]}, the student's feed-forward has {kinds[1]}"
    )
  width, most = dense.options.hidden, moe.num_retained
  count, rest = divmod(width, expert.options.hidden)
  if rest or not 1 <= count <= most:
    raise InputError(
      f'layer {layer}: the width {width} of a feed-forward is not that '
      f'of 1 to {most} experts of width {expert.options.hidden}'
    )
  return count


def _block(model: Model, layer: int) -> tuple[BlockConfig, MoeOptions | None]:
  """The options of a layer's block, and those of its experts, None if dense."""
  return [
    (stack.block, kind.moe)
    for stack in model.stacks.blocks
    for kind in stack.kinds
  ][layer]
