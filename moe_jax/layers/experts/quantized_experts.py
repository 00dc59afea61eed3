"""Feed-forward experts that are stored in codes of few bits.

An expert is decoded where it is used, one at a time, so that no layer's experts
are ever in memory as numbers together. They are for evaluation and generation;
`moe_jax.compression quantize` makes them of trained ones.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import option
from moe_jax.kernels.cpu import FEW_TOKENS
from moe_jax.layers import parameters
from moe_jax.layers.experts import few_tokens
from moe_jax.layers.experts.serving import (
  ROLE,
  SCOPE,
  Dispatch,
  Experts,
  FeedForwardExpert,
)
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.layers.parameters import Parameter
from moe_jax.layers.shared import Shared
from moe_jax.routing.dispatch import sorted_rows
from moe_jax.shapes import Array, Float, Leaf


@dataclasses.dataclass(frozen=True)
class QuantizedExpert(FeedForwardExpert):
  """The options of feed-forward experts in codes, for any dispatch."""

  format: KernelFormat = option(
    KernelFormat(), 'Storage of the kernels of experts.'
  )

  own_arrays: ClassVar[bool] = False

  def experts(self, dispatch: Dispatch, shared: Shared) -> Experts:
    """The module, which is the same for every dispatch."""
    del dispatch
    layer = FfnLayer(self.twin(1).ffn, shared, 0.0, ROLE)
    return QuantizedExperts(layer, self.format, name=SCOPE)


def _parameters(
  module: nn.Module,
  layer: FfnLayer,
  format: KernelFormat,
  num_experts: int,
  width: int,
) -> dict[str, Any]:
  """Makes the parameters of experts in `module`, each [E, ...].

  A kernel's arrays are the parts of one parameter. On a mesh they are whole on
  each device. They begin as zeros, since codes are not trained.
  """

  def kernel(name, shape):
    def make_arrays(key):
      del key
      return {
        array_name: Parameter(
          jnp.zeros(array.shape, array.dtype),
          (None,) * len(array.shape),
          role=layer.role,
          form=array.form,
        )
        for array_name, array in format.stored_arrays(shape).items()
      }

    return module.param(name, make_arrays)

  p = {}
  specs = layer.specs((num_experts,), width)
  for name, (shape, axes, form) in specs.items():
    if form == 'bias':
      init = parameters.bias(axes, role=layer.role)
      p[name] = module.param(name, init, shape, layer.shared.param_dtype)
    else:
      p[name] = kernel(name, shape)
  return p


class QuantizedExperts(Experts):
  """Experts in codes on sorted rows; those without tokens are not decoded.

  It serves the choices of any dispatch. On a mesh the compiler decides how rows
  travel.

  Attributes:
    layer: The computation of one expert.
    format: The storage of its kernels.
  """

  layer: FfnLayer
  format: KernelFormat

  def serve(self, x, routing, train):
    """`train` changes nothing."""
    del train
    layer, format, M = self.layer, self.format, x.shape[-1]
    x = x.astype(layer.shared.dtype)
    p = _parameters(self, layer, format, routing.num_experts, M)
    if x[..., 0].size <= FEW_TOKENS:
      return self._all_tokens(p, x, few_tokens.gates(routing)), None
    rows = sorted_rows.dispatch(x, routing)
    sizes = routing.rows_per_expert()
    stops = jnp.cumsum(sizes)
    block = few_tokens.block_of(len(rows), len(sizes))

    def serve(e, y):
      p_e = format.decoded_experts(_of_expert(p, e))
      begin = stops[e] - sizes[e]
      return few_tokens.serve_rows(layer, p_e, rows, y, begin, stops[e], block)

    y = _fold(sizes > 0, serve, jnp.zeros_like(rows))
    return sorted_rows.combine(y, routing), None

  def _all_tokens(self, p, x, gate):
    """The gated sum of chosen experts' outputs for all of a few tokens."""
    layer = self.layer
    rows = x.reshape(-1, x.shape[-1])

    def serve(e, y):
      p_e = self.format.decoded_experts(_of_expert(p, e))
      return y + layer.compute(p_e, rows) * gate[:, e, None]

    y = _fold((gate != 0).any(0), serve, jnp.zeros(rows.shape, jnp.float32))
    return y.astype(layer.shared.dtype).reshape(x.shape)


def _of_expert(p: dict[str, Any], e: Leaf) -> dict[str, Any]:
  """The parameters of expert e, as they are stored."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, e, keepdims=False), p
  )


def _fold(used, serve, y: Float[Array, 'N M']) -> Float[Array, 'N M']:
  """The fold y = serve(e, y) over the experts e that are used, in order."""
  order = jnp.argsort(~used)  # stable: those that are used come first
  return jax.lax.fori_loop(0, used.sum(), lambda i, y: serve(order[i], y), y)
