"""Random routing: every token has K experts drawn at random.

The baseline of Hash layers (https://arxiv.org/abs/2106.04426) and of many
others: what a router gains must be more than this. Not here: where the key
comes from.
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
  """K different experts a token, every set of K as likely as another.

  Args:
    key: The key that the experts are drawn from.
    num_groups: G.
    group_size: S.
    num_experts: E.
    num_selected: K, in [1, E].
  """
  shape = (num_groups, group_size, num_selected)
  return distinct(jax.random.bits(key, shape), num_experts)
