"""Random routing: every token has K experts drawn at random.

A baseline, as in Hash layers (https://arxiv.org/abs/2106.04426): a learned
router should do better. Not here: where the key comes from.
"""

import jax

from moe_jax.routing.hash_rule import distinct
from moe_jax.shapes import Array, Int32, PRNGKey


def random_choice(
  key: PRNGKey,
  *,
  num_groups: int,
  group_size: int,
  num_experts: int,
  num_selected: int,
) -> Int32[Array, 'G S K']:
  """Draws K different experts for each token; all sets of K are as likely.

  Args:
    key: The key that the experts are drawn from.
    num_groups: The number G of groups.
    group_size: The number S of tokens in a group.
    num_experts: The number E of experts.
    num_selected: K, in [1, E].
  """
  shape = (num_groups, group_size, num_selected)
  return distinct(jax.random.bits(key, shape), num_experts)
