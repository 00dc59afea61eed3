"""Dense feed-forwards made of a sparse layer's experts, side by side.

The rule of https://arxiv.org/abs/2605.28207: the N experts of the highest
conditional probability are concatenated into one feed-forward of N times their
width, whose output is divided by N, since a router would have weighted each by
about 1/N. The conditional probability of an expert is its mean gate over the
tokens that it serves. Where the gates of N experts are 1/N for all tokens, the
dense layer computes what the sparse one did.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import calibration
from moe_jax.compression.extract import as_one
from moe_jax.distributed import fetch
from moe_jax.errors import InputError
from moe_jax.layers.block import BlockConfig
from moe_jax.layers.experts.serving import SCOPE
from moe_jax.layers.ffn import FfnLayer
from moe_jax.models import Model, flat_trees
from moe_jax.models.layer_trees import numbers_of
from moe_jax.routing import TokenRouting
from moe_jax.shapes import Array, Float, Leaf, PRNGKey


def gate_sums(
  routing: TokenRouting,
) -> tuple[Float[Array, ' E'], Float[Array, ' E']]:
  """The sum of each expert's gates, and the number of tokens it serves."""
  gates = routing.token_gates()
  return gates.sum((0, 1)), (gates > 0).sum((0, 1)).astype(gates.dtype)


def rank(
  gates: Float[np.ndarray, ' E'], tokens: Float[np.ndarray, ' E']
) -> tuple[int, ...]:
  """The experts by falling conditional probability, of `gate_sums`.

  The lower number comes first among equals; experts that serve no token are
  last.
  """
  probability = np.where(tokens > 0, gates / np.maximum(tokens, 1), -1.0)
  return tuple(np.argsort(-probability, kind='stable').tolist())


class ConcatenationPlan(NamedTuple):
  """A plan of feed-forwards that are made of a model's experts.

  Attributes:
    model: The dense model.
    source: The sparse model.
    experts: The experts of each layer, in the order in which they stand side by
      side.
  """

  model: Model
  source: Model
  experts: Mapping[int, tuple[int, ...]]

  def describe(self) -> str:
    """A line on the experts that are concatenated."""
    experts_text = ', '.join(
      f'{list(experts)} of layer {layer}'
      for layer, experts in self.experts.items()
    )
    return f'then made of experts {experts_text}, their outputs averaged'

  def apply(
    self,
    convert: Callable[[Any, PRNGKey], dict[str, Any]],
    params: Mapping[str, Any],
    key: PRNGKey,
  ) -> dict[str, Any]:
    """The parameters of the dense model; a pure function, to be jitted.

    Args:
      convert: A function from `params` and a key to all parameters of the dense
        model; the planned feed-forwards replace its own.
      params: The parameters of the sparse model, unboxed.
      key: The key that `convert` gets.
    """
    layers = self.source.layer_trees(params)
    joined = {
      layer: as_one(
        layers[layer]['moe'][SCOPE],
        jnp.array(numbers),
        jnp.full(len(numbers), 1 / len(numbers)),
      )
      for layer, numbers in self.experts.items()
    }
    arrays = flat_trees.flatten(convert(params, key))
    for path, stacked in arrays.items():
      place = self.model.place_of(path)
      if place is None or place.name[0] != 'ffn':
        continue
      for i, layer in enumerate(numbers_of(self.model.stacks, place)):
        if layer in joined:
          array = joined[layer][place.name[-1]].astype(stacked.dtype)
          arrays[path] = arrays[path].at[i].set(array)
    return flat_trees.unflatten(arrays)


def plan(
  model: Model,
  source: Model,
  variables: Mapping[str, Any],
  batches: Iterable[Mapping[str, Leaf]],
) -> ConcatenationPlan:
  """The plan for a dense model, with experts ranked on batches of data.

  The number of experts taken is the feed-forward's width over an expert's: K
  for a dense twin, or another number.

  Args:
    model: The dense model.
    source: The sparse model.
    variables: The variables of the sparse model.
    batches: The batches.

  Raises:
    ValueError: The models do not fit, a feed-forward has no multiple of the
      width of an expert, or there are no batches.
  """
  counts = {
    layer: _num_experts(model, source, layer) for layer in source.sparse_layers
  }
  if not counts:
    raise InputError('the teacher has no sparse layers, so no experts')
  measure = jax.jit(
    lambda variables, batch: {
      layer: gate_sums(reached.routing)
      for layer, reached in calibration.capture(
        source, variables, batch
      ).items()
    }
  )
  total: dict[int, Any] = {}
  for batch in batches:
    for layer, sums in fetch(measure(variables, batch)).items():
      sums = np.asarray(sums, np.float64)
      total[layer] = total.get(layer, 0.0) + sums
  if not total:
    raise InputError('no batches to rank experts on')
  ranked = {layer: rank(*sums) for layer, sums in total.items()}
  experts = {layer: ranked[layer][:n] for layer, n in counts.items()}
  return ConcatenationPlan(model, source, experts)


def _num_experts(model: Model, source: Model, layer: int) -> int:
  """The number of experts whose joint width is that of a layer's feed-forward.

  Raises:
    ValueError: There is no such number, or the layer is not dense.
  """
  options = source.moe_of(layer)
  expert = FfnLayer(options.expert.twin(1).ffn, _block(source, layer)[0].shared)
  dense = _dense_ffn(model, layer)
  if options.shared_expert.hidden:
    raise InputError(
      f'layer {layer} of the teacher has a shared expert, which no student '
      'begins from'
    )
  if dense is None:
    raise InputError(f'layer {layer} of the student is not dense')
  kinds = [
    (x.options.activation, x.use_bias, x.gate_bias) for x in (expert, dense)
  ]
  if kinds[0] != kinds[1]:
    raise InputError(
      f'layer {layer}: experts have (activation, bias, bias of gates)='
      f"{kinds[0]}, the student's feed-forward has {kinds[1]}"
    )
  width, most = dense.options.hidden, options.num_retained
  count, rest = divmod(width, expert.options.hidden)
  if rest or not 1 <= count <= most:
    raise InputError(
      f'layer {layer}: the width {width} of a feed-forward is not that '
      f'of 1 to {most} experts of width {expert.options.hidden}'
    )
  return count


def _dense_ffn(model: Model, layer: int) -> FfnLayer | None:
  """The feed-forward of a layer; None for a sparse one, or without blocks."""
  if (moe := model.moes[layer]) is not None and moe.num_experts:
    return None
  if not model.stacks:
    return None
  block, sparse = _block(model, layer)
  twin = block.moe.twin().ffn if sparse and block.moe is not None else None
  return FfnLayer(twin or block.ffn, block.shared)


def _block(model: Model, layer: int) -> tuple[BlockConfig, bool]:
  """The options of the block of a layer, and whether its layer is sparse."""
  return [
    (stack.block, sparse)
    for _, stack in model.stacks
    for sparse in stack.sparse
  ][layer]
