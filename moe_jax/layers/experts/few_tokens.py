"""Dispatches for decoding steps of few tokens on a CPU.

These dispatches are for XLA's CPU compiler alone (`kernels/cpu.py`): it copies
a kernel that it slices out of a stack, which is too slow for a decoding step.
`Unrolled` is for few experts: they have arrays of their own, the arrays of
experts that no token chose are not read, and the program grows with E. With
`Batched`, where tokens choose most experts, all experts multiply all tokens in
one batched product. No config names these dispatches: a model that decodes
chooses them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.kernels.blocks import Block
from moe_jax.kernels.cpu import FEW_TOKENS
from moe_jax.layers.experts.dispatch_options import SCOPE, Dropless
from moe_jax.layers.ffn import FfnLayer
from moe_jax.routing import AnyRouting
from moe_jax.routing.dispatch import sorted_rows
from moe_jax.routing.rows import without_nan
from moe_jax.shapes import Array, Bool, Float

_LEAST_BLOCK, _MOST_BLOCK = 8, 256


@dataclasses.dataclass(frozen=True)
class Unrolled(Dropless):
  """The dispatch to experts one after another, each with arrays of its own.

  Parameters are then a list with one entry for each expert, where other
  dispatches have arrays [E, ...].
  """


@dataclasses.dataclass(frozen=True)
class Batched(Dropless):
  """The dispatch in which all experts multiply all tokens if these are few."""


def are_few(x: Float[Array, 'G S M']) -> bool:
  """Whether tokens are too few for sorting them by expert to be worthwhile."""
  return x.shape[0] * x.shape[1] <= FEW_TOKENS


def apply_all_experts(
  ffn: FfnLayer,
  params: dict[str, Any],
  x: Float[Array, 'G S M'],
  routing: AnyRouting,
) -> Float[Array, 'G S M']:
  """The gated sums of experts' outputs, where each multiplies all tokens.

  Args:
    ffn: The computation of one expert.
    params: The parameters, each [E, ...].
    x: The groups of tokens.
    routing: The routing of the groups.
  """
  tokens, gate = _tokens_and_gates(x, routing)
  rows = jnp.broadcast_to(tokens, (gate.shape[1], *tokens.shape))
  y = ffn.compute(params, rows)  # [E, N, M]
  y = (y * gate.T[..., None]).sum(0)
  return y.astype(ffn.shared.dtype).reshape(x.shape)


def apply_one_by_one(
  ffn: FfnLayer,
  fold: Callable[..., Array],
  x: Float[Array, 'G S M'],
  routing: AnyRouting,
) -> Float[Array, 'G S M']:
  """The gated sums of the outputs of used experts, computed one by one.

  Args:
    ffn: The computation of one expert.
    fold: The function (used, step, y) -> y that takes y = step(e, p, y) for
      each used expert e in turn, with the expert's parameters p. `used`, bool
      [E], tells the experts that have tokens; y has the outputs so far.
    x: The groups of tokens.
    routing: The routing of the groups.
  """
  x = x.astype(ffn.shared.dtype)
  if are_few(x):
    tokens, gate = _tokens_and_gates(x, routing)

    def add(e, p, y):
      return y + ffn.compute(p, tokens) * gate[:, e, None]

    y = jnp.zeros(tokens.shape, jnp.float32)
    y = fold((gate != 0).any(0), add, y)
    return y.astype(ffn.shared.dtype).reshape(x.shape)
  rows = sorted_rows.dispatch(x, routing)
  sizes = routing.rows_per_expert()
  stops = jnp.cumsum(sizes)
  share = -(-len(rows) // len(sizes) // _LEAST_BLOCK) * _LEAST_BLOCK
  size = min(max(share, _LEAST_BLOCK), _MOST_BLOCK, len(rows))

  def write(e, p, y):
    """y [N, M] with the outputs of expert e, of parameters p, for its rows.

    The rows are multiplied in blocks of one size.
    """
    begin, stop = stops[e] - sizes[e], stops[e]

    def write_block(i, y):
      first = begin + i * size
      start = jnp.minimum(first, len(rows) - size)
      block = Block(jnp.int32(0), start, first, stop, size, True)
      return block.write(y, ffn.compute(p, block.rows(rows)))

    return jax.lax.fori_loop(0, -(-(stop - begin) // size), write_block, y)

  y = fold(sizes > 0, write, jnp.zeros_like(rows))
  return sorted_rows.combine(y, routing)


def _tokens_and_gates(x, routing):
  """The N tokens of all groups x, [N, M], and the gate of each expert, [N, E].

  A gate is 0 where the expert is not chosen.
  """
  gate = routing.token_gates().reshape(-1, routing.num_experts)
  # A NaN of a token that no expert serves would stay, as 0 * NaN is NaN.
  return without_nan((gate != 0).any(1), x.reshape(-1, x.shape[-1])), gate


class OneExpert(nn.Module):
  """A module with the parameters of one expert, whose computation is `ffn`."""

  ffn: FfnLayer

  @nn.compact
  def __call__(self, width: int) -> dict[str, Any]:
    """Makes the expert's parameters, by name, for tokens of this width M."""
    return self.ffn.parameters(self, (), width)


def fold_unrolled(
  experts: list[dict[str, Any]],
  used: Bool[Array, ' E'],
  step: Callable[[int, Any, Array], Array],
  y: Float[Array, 'N M'],
) -> Float[Array, 'N M']:
  """Takes y = step(e, p, y) for each used expert e; returns the last y.

  With `experts`, the parameters p of each expert, this function is the argument
  `fold` of `apply_one_by_one`, which gives `step`. y has the outputs for N
  tokens, or for N rows that are sorted by expert.
  """
  for e, p in enumerate(experts):
    y = jax.lax.cond(
      used[e], lambda p, y, e=e: step(e, p, y), lambda p, y: y, p, y
    )
  return y


def own_name(expert: int) -> str:
  """The name of the module `OneExpert` that has the parameters of an expert."""
  return f'expert_{expert}'


def unrolled(params: dict[str, Any]) -> dict[str, Any]:
  """The parameters with arrays of its own for each expert, for `Unrolled`.

  In the module of experts, 'expert_0' and so on have the arrays of one expert.

  Args:
    params: The parameters of the model, or of a part of it, with any other
      dispatch.
  """

  def own(params):
    num_experts = len(jax.tree.leaves(params)[0])
    return {
      own_name(e): jax.tree.map(lambda leaf, e=e: leaf[e], params)
      for e in range(num_experts)
    }

  def walk(tree):
    if not isinstance(tree, dict):
      return tree
    return {
      name: own(subtree) if name == SCOPE else walk(subtree)
      for name, subtree in tree.items()
    }

  return walk(params)
