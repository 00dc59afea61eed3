"""Random routing: every token has K experts drawn at random.

A baseline, as in Hash layers (https://arxiv.org/abs/2106.04426): a learned
router should do better.
"""

import jax

from moe_jax.errors import InputError
from moe_jax.routing.hash_rule import distinct
from moe_jax.routing.size_checks import check_selected
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Int32, PRNGKey


@checked
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

  Raises:
    ValueError: K is not in [1, E], or there are no groups or no tokens.
  """
  check_selected(num_selected, num_experts)
  if num_groups < 1 or group_size < 1:
    raise InputError(
      f'num_groups={num_groups} and group_size={group_size} must be at least 1'
    )
  shape = (num_groups, group_size, num_selected)
  return distinct(jax.random.bits(key, shape), num_experts)
