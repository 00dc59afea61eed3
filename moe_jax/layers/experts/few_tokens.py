"""Experts in steps of few tokens on a CPU, where kernels must not be sliced.

XLA's CPU compiler copies a kernel that it slices out of a stack, which takes as
long as reading it; a decoding step has time for neither. Either experts have
arrays of their own, and those of experts that nobody chose are not touched (the
program grows with E: for models with few experts); or, where tokens choose most
of them, all experts multiply all tokens, in one batched product.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.dispatch import dropless
from moe_jax.dispatch.einsum import slot_mask
from moe_jax.kernels.blocks import Block
from moe_jax.layers.ffn import FfnConfig, compute, feed_forward, parameters
from moe_jax.layers.rows_product import rows_matmul
from moe_jax.routing import Routing, SlotRouting
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
    self, x: Float[Array, 'G S M'], routing: Routing | SlotRouting
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


class BatchedExperts(nn.Module):
  """Every expert on all tokens; its parameters are those of `Experts`."""

  config: FfnConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'G S M'], routing: Routing | SlotRouting
  ) -> Float[Array, 'G S M']:
    """Every expert's output, times what it gives each token."""
    gate = _gates(routing)  # [N, E]
    rows = x.reshape(-1, x.shape[-1])
    N, E = gate.shape
    rows = jnp.broadcast_to(rows, (E, N, rows.shape[1]))
    y = feed_forward(self, self.config, rows, train=False)  # [E, N, M]
    y = (y * gate.T[..., None]).sum(0)
    return y.astype(self.config.dtype).reshape(x.shape)


def most_are_chosen(tokens: int, num_selected: int, num_experts: int) -> bool:
  """Whether independent uniform choices of so many tokens leave few experts."""
  return (1 - num_selected / num_experts) ** tokens < 0.5


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
  routing: Routing | SlotRouting,
) -> Float[Array, 'G S M']:
  """Every chosen expert on all tokens, times what each gives it."""
  rows = x.reshape(-1, x.shape[-1])
  gate = _gates(routing)
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


def _gates(routing: Routing | SlotRouting) -> Float[Array, 'N E']:
  """What each expert gives each token; 0 where it was not chosen."""
  if isinstance(routing, SlotRouting):
    gate = jnp.where(slot_mask(routing), routing.gate[:, None], 0.0)
    return gate.sum(-1).reshape(-1, routing.num_experts)
  chosen = jax.nn.one_hot(routing.expert_index, routing.num_experts)
  gate = jnp.where(routing.kept, routing.gate, 0.0)
  return (chosen * gate[..., None]).sum(-2).reshape(-1, routing.num_experts)


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
