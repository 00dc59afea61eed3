"""Statistics of experts on calibration data, by which experts are ranked."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moe_jax.compression.calibration import RoutedTokens, capture
from moe_jax.devices import fetch
from moe_jax.errors import InputError
from moe_jax.layers.experts import SCOPE, Gather
from moe_jax.models import Model
from moe_jax.models.expert_arrays import Arrays, SparseLayer, sparse_layers
from moe_jax.models.trees import unflatten
from moe_jax.routing import Routing
from moe_jax.shapes import Array, Leaf


class Usage(NamedTuple):
  """Sums over the calibration tokens that reach the experts of one layer.

  Attributes:
    tokens: The number of tokens that reach some expert.
    choices: float64 [E], the number of choices that each expert serves.
    gate: float64 [E], the sum of the gates of these choices.
    gated_norm: float64 [E], the sum of gate times norm of the expert's output,
      over the choices that the expert serves.
    output: float64 [E, M], the sum of each expert's outputs over all `tokens`,
      also over tokens that do not choose the expert.
  """

  tokens: Leaf
  choices: Leaf
  gate: Leaf
  gated_norm: Leaf
  output: Leaf

  @property
  def unused(self) -> list[int]:
    """The indices of the experts that no calibration token reaches."""
    return np.flatnonzero(self.choices == 0).tolist()

  @property
  def mean_output(self) -> Float[np.ndarray, 'E M']:
    """The mean output of each expert over the tokens of the layer."""
    return self.output / max(float(self.tokens), 1.0)


# The scores [E] by which experts are ranked; an unused expert has the score 0.
SCORES: Mapping[str, Callable[[Usage], np.ndarray]] = {
  # The share of choices that falls on each expert, as in M-SMoE.
  'usage': lambda usage: usage.choices / max(float(usage.choices.sum()), 1.0),
  # The mean gate over the tokens of the layer.
  'gate': lambda usage: usage.gate / max(float(usage.tokens), 1.0),
  # The mean of gate times norm of output over the tokens of an expert,
  # https://arxiv.org/abs/2510.13999.
  'reap': lambda usage: usage.gated_norm / np.maximum(usage.choices, 1.0),
}


def measure(
  model: Model,
  variables: Mapping[str, Any],
  batches: Iterable[Mapping[str, Leaf]],
) -> dict[int, Usage]:
  """The statistics of the experts of each sparse layer, by layer index.

  Args:
    model: A model of blocks, whose tokens choose experts.
    variables: The variables of the model.
    batches: Batches of calibration data.

  Raises:
    ValueError: Experts choose tokens, or there is no batch.
  """
  for layer in model.stacks.sparse_layers:
    if model.stacks.moe_of(layer).router.by_expert:
      raise InputError(
        f'the experts of layer {layer} choose tokens, so that all are used '
        'equally'
      )
  sums = [fetch(_measure(model, variables, batch)) for batch in batches]
  if not sums:
    raise InputError('there are no batches of calibration data')
  return jax.tree.map(lambda *x: np.sum(x, 0, np.float64), *sums)


@functools.partial(jax.jit, static_argnames='model')
def _measure(
  model: Model, variables: Mapping[str, Any], batch: Mapping[str, Leaf]
) -> dict[int, Usage]:
  tokens = capture(model, variables, batch)
  layers = sparse_layers(model, variables)
  return {
    number: _layer_usage(_expert_function(layer), layer.experts, tokens[number])
    for number, layer in layers.items()
  }


def _layer_usage(
  apply: Callable[[Arrays, Array], Array], experts: Arrays, tokens: RoutedTokens
) -> Usage:
  routing = cast(Routing, tokens.routing)
  is_kept = routing.kept.reshape(-1, routing.kept.shape[-1])  # [N, K]
  index = routing.expert_index.reshape(is_kept.shape)
  gate = routing.token_gates().reshape(len(is_kept), -1)  # [N, E]
  is_served = is_kept.any(-1)

  def sums_of(numbered_params):
    e, params = numbered_params
    y = apply(params, tokens.x).astype(jnp.float32).reshape(len(is_kept), -1)
    y = jnp.where(is_served[:, None], y, 0.0)
    return y.sum(0), (gate[:, e] * jnp.linalg.norm(y, axis=-1)).sum()

  E = routing.num_experts
  output, gated_norm = jax.lax.map(sums_of, (jnp.arange(E), experts))
  served = is_kept[..., None] & jax.nn.one_hot(index, E, dtype=bool)
  return Usage(
    tokens=is_served.sum(),
    choices=served.sum((0, 1)),
    gate=gate.sum(0),
    gated_norm=gated_norm,
    output=output,
  )


def _expert_function(layer: SparseLayer) -> Callable[[Arrays, Array], Array]:
  """The function from an expert's parameters and inputs to its outputs."""
  module = layer.moe.expert.experts(Gather(), layer.shared)

  def apply_expert(params: Arrays, x: Float[Array, 'G S M']) -> Array:
    G, S, _ = x.shape
    slot = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (G, S))
    ones = jnp.ones((G, S, 1), jnp.float32)
    full_routing = Routing(
      expert_index=jnp.zeros((G, S, 1), jnp.int32),
      slot=slot[..., None],
      gate=ones,
      kept=ones > 0,
      num_experts=1,
      capacity=S,
    )
    tree = unflatten(
      {p[p.index(SCOPE) + 1 :]: array[None] for p, array in params.items()}
    )
    return module.apply({'params': tree}, x, full_routing)[0]

  return apply_expert
