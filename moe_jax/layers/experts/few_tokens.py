"""Experts in steps of few tokens on a CPU, without slices of kernels.

This is for XLA's CPU compiler alone (`kernels/cpu.py`): it copies a kernel that
it slices out of a stack, which is too slow for a decoding step. Either experts
have arrays of their own, and those of experts that no token chose are not read
(the program grows with E, so this is for few experts); or, where tokens choose
most experts, all experts multiply all tokens in one batched product. No config
names these dispatches: a model that decodes chooses them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.kernels.blocks import Block
from moe_jax.kernels.cpu import FEW_TOKENS
from moe_jax.layers.experts.serving import SCOPE, Experts
from moe_jax.layers.experts.sorted_rows_experts import (
  Dropless,
  SortedRowsExperts,
)
from moe_jax.layers.ffn import FfnLayer
from moe_jax.routing import AnyRouting
from moe_jax.routing.dispatch import sorted_rows
from moe_jax.shapes import Array, Float, Int32

_LEAST_BLOCK, _MOST_BLOCK = 8, 256


@dataclasses.dataclass(frozen=True)
class Unrolled(Dropless):
  """The dispatch of experts with arrays of their own, made by `unrolled`."""

  def feed_forward(self, layer: FfnLayer) -> Experts:
    return UnrolledExperts(layer, name=SCOPE)


@dataclasses.dataclass(frozen=True)
class Batched(Dropless):
  """The dispatch of few tokens to all experts, and of many as in Dropless."""

  def feed_forward(self, layer: FfnLayer) -> Experts:
    return BatchedExperts(layer, self, name=SCOPE)


class UnrolledExperts(Experts):
  """Like `SortedRowsExperts`, with arrays for each expert and no dropout.

  Attributes:
    layer: The computation of one expert.
  """

  layer: FfnLayer

  def serve(self, x, routing, train):
    """`train` changes nothing."""
    del train
    x = x.astype(self.layer.shared.dtype)
    experts = [
      _Kernels(self.layer, name=_name(e))(x.shape[-1])
      for e in range(routing.num_experts)
    ]
    if x.shape[0] * x.shape[1] <= FEW_TOKENS:
      return _all_tokens(self.layer, experts, x, routing), None
    rows = sorted_rows.dispatch(x, routing)
    sizes = routing.rows_per_expert()
    rows = _all_rows(self.layer, experts, rows, sizes)
    return sorted_rows.combine(rows, routing), None


class BatchedExperts(SortedRowsExperts):
  """Experts that multiply all tokens, if these are few, and weight the outputs.

  Its parameters are those of `SortedRowsExperts`, and it serves more tokens as
  that does. It has no dropout.
  """

  def serve(self, x, routing, train):
    if x[..., 0].size > FEW_TOKENS:
      return super().serve(x, routing, train)
    layer, gate = self.layer, gates(routing)  # [N, E]
    rows = x.reshape(-1, x.shape[-1])
    N, E = gate.shape
    rows = jnp.broadcast_to(rows, (E, N, rows.shape[1]))
    p = layer.parameters(self, (E,), rows.shape[-1])
    y = layer.compute(p, rows)  # [E, N, M]
    y = (y * gate.T[..., None]).sum(0)
    return y.astype(layer.shared.dtype).reshape(x.shape), None


class _Kernels(nn.Module):
  """A module with the parameters of one expert."""

  layer: FfnLayer

  @nn.compact
  def __call__(self, width: int) -> dict[str, Any]:
    return self.layer.parameters(self, (), width)


def _name(expert: int) -> str:
  return f'expert_{expert}'


def unrolled(params: dict[str, Any]) -> dict[str, Any]:
  """The parameters of a model for the dispatch `Unrolled`.

  Args:
    params: The parameters of the model, or of a part of it, with any other
      dispatch.
  """

  def walk(tree):
    if not isinstance(tree, dict):
      return tree
    return {
      name: unstack(subtree) if name == SCOPE else walk(subtree)
      for name, subtree in tree.items()
    }

  return walk(params)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
  """The parameters of `UnrolledExperts` from those of stacked experts."""
  num_experts = len(jax.tree.leaves(params)[0])
  return {
    _name(e): jax.tree.map(lambda leaf, e=e: leaf[e], params)
    for e in range(num_experts)
  }


def _all_tokens(
  layer: FfnLayer,
  experts: list[dict[str, Any]],
  x: Float[Array, 'G S M'],
  routing: AnyRouting,
) -> Float[Array, 'G S M']:
  """The sum of the outputs of all chosen experts for all tokens, gated."""
  rows = x.reshape(-1, x.shape[-1])
  gate = gates(routing)
  used = (gate != 0).any(0)
  y = jnp.zeros(rows.shape, jnp.float32)
  for e, p in enumerate(experts):

    def serve(y, rows, weight, p):
      return y + layer.compute(p, rows) * weight[:, None]

    def skip(y, rows, weight, p):
      del rows, weight, p
      return y

    y = jax.lax.cond(used[e], serve, skip, y, rows, gate[:, e], p)
  return y.astype(layer.shared.dtype).reshape(x.shape)


def gates(routing: AnyRouting) -> Float[Array, 'N E']:
  """Each expert's gate for each token; 0 where the expert is not chosen."""
  return routing.token_gates().reshape(-1, routing.num_experts)


def _all_rows(
  layer: FfnLayer,
  experts: list[dict[str, Any]],
  x: Float[Array, 'N M'],
  group_sizes: Int32[Array, ' E'],
) -> Float[Array, 'N M']:
  """The output of each expert for its own rows, in blocks of one size."""
  size = block_of(len(x), len(experts))
  stops = jnp.cumsum(group_sizes)
  y = jnp.zeros_like(x)
  for e, p in enumerate(experts):
    y = serve_rows(layer, p, x, y, stops[e] - group_sizes[e], stops[e], size)
  return y


def block_of(num_rows: int, num_experts: int) -> int:
  """The number of rows that `serve_rows` multiplies at a time."""
  share = -(-num_rows // num_experts // _LEAST_BLOCK) * _LEAST_BLOCK
  return min(max(share, _LEAST_BLOCK), _MOST_BLOCK, num_rows)


def serve_rows(
  layer: FfnLayer,
  p: dict[str, Any],
  x: Float[Array, 'N M'],
  y: Float[Array, 'N M'],
  begin: Int32[Array, ''],
  stop: Int32[Array, ''],
  size: int,
) -> Float[Array, 'N M']:
  """y with one expert's outputs for its rows of x, in blocks of one size.

  Args:
    layer: The computation of the expert.
    p: The parameters of the expert.
    x: The rows of all experts.
    y: The outputs so far.
    begin: The number of the expert's first row.
    stop: The number of the row after its last one.
    size: The number of rows of a block.
  """

  def serve_block(i, y):
    first = begin + i * size
    start = jnp.minimum(first, len(x) - size)
    block = Block(jnp.int32(0), start, first, stop, size, True)
    return block.write(y, layer.compute(p, block.rows(x)))

  return jax.lax.fori_loop(0, -(-(stop - begin) // size), serve_block, y)
