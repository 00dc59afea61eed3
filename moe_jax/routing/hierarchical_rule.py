"""Two levels of gates over a * b experts (Shazeer et al. 2017, Appendix B).

https://arxiv.org/abs/1701.06538. A primary gate chooses among a branches, and
each branch's own gate among its b experts: expert i * b + j is expert j of
branch i. The result is a `Routing` over all experts, whose gates are products
of both levels' gates; any dispatcher takes it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.routing.aux_losses import cv_squared
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Bool, Float32, Int32


@checked
def flat_choices(
  branch_index: Int32[Array, 'G S K1'],
  branch_gate: Float32[Array, 'G S K1'],
  expert_index: Int32[Array, 'G S K1 K2'],
  expert_gate: Float32[Array, 'G S K1 K2'],
  branch_size: int,
) -> tuple[Int32[Array, 'G S K'], Float32[Array, 'G S K']]:
  """The K1 * K2 choices among all experts, and their gates gp_i * g_ij.

  The choices of a token's first branch come first.

  Args:
    branch_index: The chosen branches, in [0, a).
    branch_gate: The primary gate's weights of the chosen branches.
    expert_index: The experts chosen within each chosen branch, in [0, b).
    expert_gate: The weights of those experts, from their branch's gate.
    branch_size: b, the number of experts in a branch.

  Source: Eq. 12 of arXiv:1701.06538.
  """
  G, S, K1, K2 = expert_index.shape
  index = branch_index[..., None] * branch_size + expert_index
  gate = branch_gate[..., None] * expert_gate
  return index.reshape(G, S, K1 * K2), gate.reshape(G, S, K1 * K2)


@checked
def hierarchical_load(
  branch_probability: Float32[Array, 'G S A'],
  expert_probability: Float32[Array, 'G S K1 B'],
  branch_index: Int32[Array, 'G S K1'],
  mask: Bool[Array, 'G S'],
) -> Float32[Array, 'G E']:
  """Load_H, for expert j of branch i: Load_p(X)_i * Load_i(X_i)_j / |X_i|.

  X_i are the real tokens that chose branch i; the load of a branch that nobody
  chose is 0. The first factor is where the primary gate's gradient comes from.

  Args:
    branch_probability: P(x, i) of the primary gate (`load_probability`).
    expert_probability: P(x, j) of the gate of each chosen branch.
    branch_index: The chosen branches.
    mask: False for padding.

  Source: Eq. 14 of arXiv:1701.06538.
  """
  G, _, A = branch_probability.shape
  real = mask[..., None]
  branch_load = jnp.where(real, branch_probability, 0.0).sum(1)  # [G, A]
  chosen = jax.nn.one_hot(branch_index, A) * real[..., None]  # [G, S, K1, A]
  num_chosen = chosen.sum((1, 2))  # [G, A]
  expert_load = jnp.einsum(
    'GSKA,GSKB->GAB',
    chosen,
    jnp.where(real[..., None], expert_probability, 0.0),
    precision=jax.lax.Precision.HIGHEST,
  )
  share = branch_load / jnp.maximum(num_chosen, 1.0)
  return (share[..., None] * expert_load).reshape(G, -1)


def hierarchical_load_loss(
  branch_probability: Float32[Array, 'G S A'],
  expert_probability: Float32[Array, 'G S K1 B'],
  branch_index: Int32[Array, 'G S K1'],
  mask: Bool[Array, 'G S'],
) -> Float32[Array, ' G']:
  """CV(Load_H)^2; arguments are those of `hierarchical_load`."""
  return cv_squared(
    hierarchical_load(
      branch_probability, expert_probability, branch_index, mask
    )
  )


@checked
def over_levels(
  per_token: Callable[[Array], Array],
  branch_logits: Float32[Array, 'G S A'],
  branch_gate: Float32[Array, 'G S K1'],
  expert_logits: Float32[Array, 'G P B'],
  mask: Bool[Array, 'G S'],
) -> Float32[Array, '']:
  """The sum over real tokens of a measure of the logits of both levels.

  The measure of the primary gate's logits is added to those of the chosen
  branches' logits, weighted by the primary gate. The weights have no gradient,
  so that the z-loss does not move tokens to branches with small logits.

  Args:
    per_token: The measure, from logits to a number for each token.
    branch_logits: The primary gate's logits.
    branch_gate: The weights of the chosen branches.
    expert_logits: The logits within each chosen branch, P = S * K1.
    mask: False for padding.
  """
  inner = per_token(expert_logits).reshape(branch_gate.shape)
  gate = jax.lax.stop_gradient(branch_gate)
  measure = per_token(branch_logits) + (gate * inner).sum(-1)  # [G, S]
  return jnp.where(mask, measure, 0.0).sum()
