"""Choices that are limited to some groups of experts: DeepSeek's groups.

The experts of a group have consecutive numbers, as those on one device or one
node have. Each token chooses among the experts of its best groups alone.
DeepSeek-V2 (https://arxiv.org/abs/2405.04434, section 2.2.2) rates a group by
the best of its scores, DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section
2.1.2) by the sum of its two best ones.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.options import unknown
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float32

# The number of a group's best scores whose sum rates it, by its name.
GROUP_SCORES = {'best': 1, 'two_best': 2}
# The score of an expert that is outside of the chosen groups, by its name.
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
  """The scores by which tokens choose, without the groups that are not theirs.

  Ties between groups go to the lower one. There is no gradient.

  Args:
    scores: The scores of all experts, with a bias if they have one.
    num_groups: The number of groups, which divides E.
    chosen_groups: The number of groups that a token chooses among.
    group_score: The score that rates a group: its 'best' (DeepSeek-V2), or the
      sum of its 'two_best' (DeepSeek-V3).
    outside: The score that replaces those outside of the chosen groups:
      'minus_infinity', or 'zero' (DeepSeek-V2), which an expert inside whose
      score is negative loses to.

  Raises:
    ValueError: An option is unknown, or the sizes do not fit.
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
  """The problems of groups with E, before arrays exist."""
  size, remainder = divmod(num_experts, num_groups)
  if remainder:
    yield f'num_experts={num_experts} does not divide by {num_groups} groups'
  elif size < GROUP_SCORES[group_score]:
    yield (
      f'num_experts={num_experts} in {num_groups} groups: each has {size}, and '
      f'{group_score!r} needs {GROUP_SCORES[group_score]}'
    )
