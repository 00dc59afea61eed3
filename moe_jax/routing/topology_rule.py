"""The gate of FasterMoE, under which few tokens leave the node they are on.

He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418, the
topology-aware gate. E experts are laid over Q nodes in order, E / Q on each.
A token may go to experts of its own node as it likes; at most L tokens of a
group go to others. Functions here return choices, which `token_choice` serves.
Not here: the node of each group, and L (`moe_jax.layers.routers`); machines and
what their links carry (`moe_jax.parallel`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.routing.rows import decided
from moe_jax.routing.token_choice_rule import at_choices, choose
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Bool, Float32, Int32


@checked
def limited_choice(
  router_logits: Float32[Array, 'G S E'],
  node: Int32[Array, ' G'],
  mask: Bool[Array, 'G S'],
  *,
  num_selected: int,
  num_nodes: int,
  limit: int,
) -> Int32[Array, 'G S K']:
  """The choices of the published gate, the likeliest expert first.

  A token wants to leave if one of the experts of its K largest logits is on
  another node. If more than L tokens of a group want to, the L with the highest
  scores keep their choices, and each of the others chooses its K largest logits
  among the experts of its own node. A token's score is the probability, among
  all experts, of the best remote expert that it wants; ties go to the earlier
  token.

  Source: the gate of FasterMoE, which is printed for a token's best expert.
  Unlike the paper, which does not say what several choices of a token count, a
  token counts once, however many of them are remote; with K = 1 both are the
  same. The paper does not say either whether a score is a probability.

  Args:
    router_logits: The logits, with their noise if they have any.
    node: The node of each group, in [0, Q).
    mask: False for padding, which never wants to leave.
    num_selected: K, at most the number of experts on a node.
    num_nodes: Q, a divisor of E.
    limit: L, the number of tokens of a group that may leave.

  Raises:
    ValueError: Q does not divide E, K is not in [1, E / Q], or L < 0.
  """
  _check(router_logits.shape[-1], num_selected, num_nodes, limit)
  router_logits = jax.lax.stop_gradient(router_logits)
  free_choice = choose(router_logits, num_selected)
  remote = _is_remote(free_choice, node, router_logits.shape[-1] // num_nodes)
  probs = jax.nn.log_softmax(router_logits)
  score = jnp.where(remote, at_choices(probs, free_choice), -jnp.inf).max(-1)
  wants = remote.any(-1) & mask
  leaves = wants & _are_highest(jnp.where(wants, score, -jnp.inf), limit)
  local = _local_choice(router_logits, node, num_selected, num_nodes)
  return decided(jnp.where((wants & ~leaves)[..., None], local, free_choice))


@checked
def fastmoe_choice(
  router_logits: Float32[Array, 'G S E'],
  node: Int32[Array, ' G'],
  mask: Bool[Array, 'G S'],
  *,
  num_nodes: int,
  limit: int,
) -> Int32[Array, 'G S K']:
  """The two choices of each token under the gate that FastMoE ships.

  Where fewer than L tokens of a group have a remote first choice, all choose
  their two largest logits. Otherwise each token chooses the two largest of its
  own node, and the L tokens whose remote first choices have the largest logits
  have it in place of their second. So the remote expert then comes second,
  second choices of the first case leave without a limit, and with L = S the
  gate still differs from plain top-2 where all first choices are remote.

  Source: `FasterGate` in fmoe/gates/faster_gate.py of FastMoE, without shadowed
  experts, which count as local there. Unlike there, padding has no choices, and
  ties go to the earlier token.

  Arguments and errors are those of `limited_choice`, with K = 2.
  """
  _check(router_logits.shape[-1], 2, num_nodes, limit)
  router_logits = jax.lax.stop_gradient(router_logits)
  free_choice = choose(router_logits, 2)
  first = free_choice[..., :1]
  remote = _is_remote(first, node, router_logits.shape[-1] // num_nodes)
  wants = remote[..., 0] & mask
  score = jnp.where(wants, at_choices(router_logits, first)[..., 0], -jnp.inf)
  leaves = wants & _are_highest(score, limit)
  local = _local_choice(router_logits, node, 2, num_nodes)
  second = jnp.where(leaves[..., None], first, local[..., 1:])
  limited = jnp.concatenate([local[..., :1], second], -1)
  binds = wants.sum(-1) >= limit  # [G]
  return decided(jnp.where(binds[:, None, None], limited, free_choice))


class Leaving(NamedTuple):
  """The tokens of each group that want to leave their node, and that do.

  Those that want to and do not are kept at home.

  Attributes:
    tokens: float32 [G], the number of real tokens.
    wanting: float32 [G], the number of tokens one of whose K largest logits is
      that of an expert on another node.
    leaving: float32 [G], the number of tokens that chose such an expert.
  """

  tokens: Array
  wanting: Array
  leaving: Array


@checked
def leaving(
  router_logits: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  node: Int32[Array, ' G'],
  mask: Bool[Array, 'G S'],
  num_nodes: int,
) -> Leaving:
  """Counts the real tokens that want to leave their node, and that do.

  Args:
    router_logits: The logits.
    expert_index: The experts that tokens chose, under any rule.
    node: The node of each group, in [0, Q).
    mask: False for padding.
    num_nodes: Q, a divisor of E.
  """
  per_node = router_logits.shape[-1] // num_nodes
  free_choice = choose(router_logits, expert_index.shape[-1])

  def count_remote(index):
    is_remote = _is_remote(index, node, per_node).any(-1) & mask
    return is_remote.sum(-1).astype(jnp.float32)

  tokens = mask.sum(-1).astype(jnp.float32)
  return Leaving(tokens, count_remote(free_choice), count_remote(expert_index))


def _check(E: int, K: int, Q: int, limit: int) -> None:
  if Q < 1 or E % Q:
    raise InputError(f'num_experts={E} is not divisible by num_nodes={Q}')
  if not 1 <= K <= E // Q:
    raise InputError(
      f'num_selected={K} not in [1, {E // Q}], the {E} experts on {Q} nodes'
    )
  if limit < 0:
    raise InputError(f'limit={limit} is negative')


def _is_remote(index, node, per_node):
  """Whether each choice [G, S, K] is an expert of another node."""
  return index // per_node != node[:, None, None]


def _local_choice(router_logits, node, K, Q):
  """The K largest logits among the experts of the group's own node."""
  E = router_logits.shape[-1]
  experts = jnp.arange(E, dtype=jnp.int32)[None, None]
  is_remote = _is_remote(experts, node, E // Q)  # [G, 1, E]
  return choose(jnp.where(is_remote, -jnp.inf, router_logits), K)


def _are_highest(score, count):
  """Whether each token's score [G, S] is among the highest of its group."""
  rank = jnp.argsort(jnp.argsort(-score))
  return rank < count
