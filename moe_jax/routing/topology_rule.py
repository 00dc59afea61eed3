"""The gate of FasterMoE, under which few tokens leave the node they are on.

He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418, the
topology-aware gate. E experts are laid over Q nodes in order, E / Q on each.
A token may go to experts of its own node as it likes; at most L tokens of a
group go to others. The rule returns choices, which `token_choice` serves.
"""

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
  E, K, Q = router_logits.shape[-1], num_selected, num_nodes
  if Q < 1 or E % Q:
    raise InputError(f'num_experts={E} is not divisible by num_nodes={Q}')
  if not 1 <= K <= E // Q:
    raise InputError(
      f'num_selected={K} not in [1, {E // Q}], the {E} experts on {Q} nodes'
    )
  if limit < 0:
    raise InputError(f'limit={limit} is negative')
  router_logits = jax.lax.stop_gradient(router_logits)
  free_choice = choose(router_logits, K)
  remote = _is_remote(free_choice, node, E // Q)
  probs = jax.nn.log_softmax(router_logits)
  score = jnp.where(remote, at_choices(probs, free_choice), -jnp.inf).max(-1)
  wants = remote.any(-1) & mask
  rank = jnp.argsort(jnp.argsort(-jnp.where(wants, score, -jnp.inf)))
  leaves = wants & (rank < limit)
  experts = jnp.arange(E, dtype=jnp.int32)[None, None]
  elsewhere = _is_remote(experts, node, E // Q)  # [G, 1, E]
  local = choose(jnp.where(elsewhere, -jnp.inf, router_logits), K)
  return decided(jnp.where((wants & ~leaves)[..., None], local, free_choice))


def _is_remote(index, node, per_node):
  """Whether each choice [G, S, K] is an expert of another node."""
  return index // per_node != node[:, None, None]
