"""Choices that are limited to some of the experts: DeepSeek's and FasterMoE's.

In DeepSeek's rules the experts of a group have consecutive indices, like the
experts on one device or one node, and a token chooses among the experts of its
best groups alone. DeepSeek-V2 (https://arxiv.org/abs/2405.04434, section 2.2.2)
rates a group by the best of its scores, DeepSeek-V3
(https://arxiv.org/abs/2412.19437, section 2.1.2) by the sum of its best two.

The topology-aware gate of FasterMoE (He et al., PPoPP 2022,
https://doi.org/10.1145/3503221.3508418) lays E experts over Q nodes in order,
E / Q on each. A token may go to any expert of its own node; at most L tokens of
a group go to experts of other nodes. The rule returns choices, which
`token_choice` serves.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.routing.rows import decided
from moe_jax.routing.token_choice_rule import at_choices, choose
from moe_jax.shapes import Array, Bool, Float32, Int32, checked

# The number of a group's best scores whose sum rates the group, for each value
# of `group_score`.
GROUP_SCORES = {'best': 1, 'two_best': 2}
# The score of experts outside of the chosen groups, for each value of
# `outside`.
OUTSIDE = {'minus_infinity': -jnp.inf, 'zero': 0.0}


@checked
def limited_scores(
  scores: Float32[Array, '*G E'],
  *,
  num_groups: int,
  chosen_groups: int,
  group_score: str = 'best',
  outside: str = 'minus_infinity',
) -> Float32[Array, '*G E']:
  """The scores by which tokens choose, changed outside of their best groups.

  Ties between groups go to the group of lower index. There is no gradient.

  Args:
    scores: The scores of all experts, with a bias if they have one.
    num_groups: The number of groups, which divides E.
    chosen_groups: The number of groups that a token chooses among.
    group_score: The score that rates a group: its 'best' (DeepSeek-V2), or the
      sum of its 'two_best' (DeepSeek-V3).
    outside: The score that experts outside of the chosen groups get:
      'minus_infinity', or 'zero' (DeepSeek-V2), to which an expert of a chosen
      group loses if its score is negative.

  Raises:
    ValueError: An option is unknown, `num_groups` does not divide E, groups
      of one expert are to be rated by two scores, or `chosen_groups` is not in
      [1, num_groups].
  """
  for name, value, allowed in (
    ('group_score', group_score, GROUP_SCORES),
    ('outside', outside, OUTSIDE),
  ):
    if value not in allowed:
      raise unknown(name, value, allowed)
  E = scores.shape[-1]
  for problem in group_problems(E, num_groups, group_score):
    raise InputError(problem)
  if not 1 <= chosen_groups <= num_groups:
    raise InputError(
      f'chosen_groups={chosen_groups} not in [1, num_groups={num_groups}]'
    )
  scores = jax.lax.stop_gradient(scores)
  grouped = scores.reshape(*scores.shape[:-1], num_groups, -1)
  best, _ = jax.lax.top_k(grouped, GROUP_SCORES[group_score])
  _, chosen = jax.lax.top_k(best.sum(-1), chosen_groups)  # [..., chosen]
  inside = jax.nn.one_hot(chosen, num_groups, dtype=jnp.bool_).any(-2)
  grouped = jnp.where(inside[..., None], grouped, OUTSIDE[outside])
  return grouped.reshape(scores.shape)


def group_problems(
  num_experts: int, num_groups: int, group_score: str
) -> Iterator[str]:
  """The reasons why E experts cannot form `num_groups` groups, as texts.

  Groups are equally large, and have at least two experts if `group_score` is
  'two_best'. Nothing is yielded if all is well.
  """
  size, remainder = divmod(num_experts, num_groups)
  if remainder:
    yield f'num_experts={num_experts} does not divide by {num_groups} groups'
  elif size < GROUP_SCORES[group_score]:
    yield (
      f'num_experts={num_experts} in {num_groups} groups: each has {size}, and '
      f'{group_score!r} needs {GROUP_SCORES[group_score]}'
    )


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
  """The choices of FasterMoE's gate, the likeliest expert of a token first.

  A token wants to leave its node if an expert of its K largest logits is on
  another node. If more than L tokens of a group want to leave, the L tokens
  with the highest scores keep their choices, and each of the others chooses its
  K largest logits among the experts of its own node. A token's score is the
  probability, among all experts, of the best remote expert that it wants; ties
  go to the earlier token.

  Source: the gate of FasterMoE, which is printed for a token's best expert.
  Unlike the paper, which does not say what several choices of a token count, a
  token counts once, however many of them are remote; with K = 1 both are the
  same. The paper does not say either whether a score is a probability.

  Args:
    router_logits: The logits, with their noise if they have any.
    node: The index of the node of each group, in [0, Q).
    mask: False for padding, which never wants to leave.
    num_selected: K, at most the number of experts on a node.
    num_nodes: Q, a divisor of E.
    limit: L, the number of tokens of a group that may leave their node.

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
  """Whether each choice, an expert's index [G, S, K], is on another node.

  `node` [G] is the node of each group; a node has `per_node` experts.
  """
  return index // per_node != node[:, None, None]
