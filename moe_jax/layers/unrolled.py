"""Experts with arrays of their own, for steps of few tokens on a CPU.

XLA's CPU compiler copies a kernel that it slices out of a stack, which takes as
long as reading it; a decoding step has time for neither. Here no kernel is
sliced, and those of experts that nobody chose are not touched. The program
grows with E: for generation from models with few experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.dispatch import dropless
from moe_jax.kernels.blocks import Block
from moe_jax.layers.ffn import FfnConfig, compute, parameters
from moe_jax.layers.matmul import rows_matmul
from moe_jax.routing import Routing
from moe_jax.shapes import Array, Float, Int32

# Up to here an expert multiplies all tokens: the time goes into reading its
# kernels, and nothing is sorted.
FEW_TOKENS = 16
_LEAST_BLOCK, _MOST_BLOCK = 8, 256


class UnrolledExperts(nn.Module):
  """As `DroplessExperts`, without dropout; `unstack` gives its parameters."""

  config: FfnConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'G S M'], routing: Routing
  ) -> Float[Array, 'G S M']:
    """Dispatches, applies the experts, combines."""
    c = self.config
    x = x.astype(c.dtype)
    experts = [
      _Kernels(c, name=f'expert_{e}')(x.shape[-1])
      for e in range(routing.num_experts)
    ]
    if x.shape[0] * x.shape[1] <= FEW_TOKENS:
      return _all_tokens(c, experts, x, routing)
    rows = dropless.dispatch(x, routing)
    sizes = dropless.group_sizes(routing)
    return dropless.combine(_own_rows(c, experts, rows, sizes), routing)


class _Kernels(nn.Module):
  """One expert's parameters."""

  config: FfnConfig

  @nn.compact
  def __call__(self, width: int) -> dict[str, Any]:
    return parameters(self, self.config, (), width)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
  """`UnrolledExperts`' parameters from those of `Experts`."""
  num_experts = len(params['w_in'])
  return {
    f'expert_{e}': {name: leaf[e] for name, leaf in params.items()}
    for e in range(num_experts)
  }


def _feed_forward(c, p, x):
  return compute(
    c,
    p,
    x,
    product=rows_matmul,
    add_bias=lambda y, b: y + b[None],
    dropout=lambda h: h,
  )


def _all_tokens(
  c: FfnConfig,
  experts: list[dict[str, Any]],
  x: Float[Array, 'G S M'],
  routing: Routing,
) -> Float[Array, 'G S M']:
  """Every chosen expert on all tokens, times what each gives it."""
  rows = x.reshape(-1, x.shape[-1])
  chosen = jax.nn.one_hot(routing.expert_index, len(experts))
  gate = jnp.where(routing.kept, routing.gate, 0.0)
  gate = (chosen * gate[..., None]).sum(-2).reshape(len(rows), -1)  # [N, E]
  used = (gate != 0).any(0)
  y = jnp.zeros(rows.shape, jnp.float32)
  for e, p in enumerate(experts):

    def serve(y, rows, weight, p):
      return y + _feed_forward(c, p, rows) * weight[:, None]

    def skip(y, rows, weight, p):
      del rows, weight, p
      return y

    y = jax.lax.cond(used[e], serve, skip, y, rows, gate[:, e], p)
  return y.astype(c.dtype).reshape(x.shape)


def _own_rows(
  c: FfnConfig,
  experts: list[dict[str, Any]],
  x: Float[Array, 'N M'],
  group_sizes: Int32[Array, ' E'],
) -> Float[Array, 'N M']:
  """Each expert on its own rows, in blocks of one size."""
  N, E = len(x), len(experts)
  share = -(-N // E // _LEAST_BLOCK) * _LEAST_BLOCK
  size = min(max(share, _LEAST_BLOCK), _MOST_BLOCK, N)
  stops = jnp.cumsum(group_sizes)
  y = jnp.zeros_like(x)
  for e, p in enumerate(experts):
    begin, stop = stops[e] - group_sizes[e], stops[e]

    def one(i, y, p=p, begin=begin, stop=stop):
      first = begin + i * size
      start = jnp.minimum(first, N - size)
      block = Block(jnp.int32(0), start, first, stop, size, True)
      return block.put(y, _feed_forward(c, p, block.rows(x)))

    y = jax.lax.fori_loop(0, -(-group_sizes[e] // size), one, y)
  return y
