"""Options that limit a token's choice to its best groups of experts.

DeepSeek-V2 and V3. The rule is `moe_jax.routing.limited_rules`.
"""

import dataclasses
import functools

from moe_jax.layers.routers.contract import RouterOptions
from moe_jax.options import at_least, one_of, option
from moe_jax.partitioning import on_each_device
from moe_jax.routing.limited_rules import (
  GROUP_SCORES,
  OUTSIDE,
  group_problems,
  limited_scores,
)
from moe_jax.shapes import Array, Float32

_SEVERAL = {'expert_groups': at_least(2)}


@dataclasses.dataclass(frozen=True)
class ExpertGroups(RouterOptions):
  """The options of a router whose tokens may choose groups of experts first."""

  expert_groups: int = option(
    1,
    'Number of groups of consecutive experts, of which a token chooses some '
    "before it chooses experts in them (DeepSeek checkpoints' n_group: 8 in "
    'V3); 1: all experts are one group.',
    at_least(1),
  )
  chosen_expert_groups: int = option(
    1,
    'Number of groups of experts that each token chooses (topk_group: 4 in '
    'V3).',
    at_least(1),
    when=_SEVERAL,
  )
  expert_group_score: str = option(
    'best',
    "Score by which a token chooses a group of experts: its 'best' score "
    "(DeepSeek-V2), or the sum of its 'two_best' (DeepSeek-V3).",
    one_of(*GROUP_SCORES),
    when=_SEVERAL,
  )
  outside_expert_groups: str = option(
    'minus_infinity',
    "Score of experts outside of the chosen groups: 'minus_infinity' (V3), or "
    "'zero' (V2), with which they win over biased scores below zero.",
    one_of(*OUTSIDE),
    when=_SEVERAL,
  )

  def problems(self):
    """The problem of more chosen groups than there are."""
    yield from super().problems()
    chosen, groups = self.chosen_expert_groups, self.expert_groups
    if chosen > groups:
      yield f'chosen_expert_groups={chosen} is more than expert_groups={groups}'

  def problems_with(self, sizes):
    """The problems of groups with E and with K."""
    yield from super().problems_with(sizes)
    E, K, groups = sizes.num_experts, sizes.num_selected, self.expert_groups
    if groups == 1:
      return
    problems = list(group_problems(E, groups, self.expert_group_score))
    yield from (f'{problem} of router.expert_groups' for problem in problems)
    open_experts = self.chosen_expert_groups * E // groups
    if open_experts < K and not problems:
      yield (
        f'num_selected={K} is more than the {open_experts} experts of the '
        f'chosen_expert_groups={self.chosen_expert_groups}'
      )

  def shrunk(self):
    """See `Options.shrunk`: a token chooses one of two groups of experts."""
    if self.expert_groups == 1:
      return self
    return dataclasses.replace(self, expert_groups=2, chosen_expert_groups=1)


def within_groups(
  options: ExpertGroups, scores: Float32[Array, 'G S E']
) -> Float32[Array, 'G S E']:
  """The scores by which tokens choose, in their best groups of experts."""
  if options.expert_groups == 1:
    return scores
  rule = functools.partial(
    limited_scores,
    num_groups=options.expert_groups,
    chosen_groups=options.chosen_expert_groups,
    group_score=options.expert_group_score,
    outside=options.outside_expert_groups,
  )
  # It runs on each device, as no compiler splits a top-K over groups.
  return on_each_device(rule, (scores,))
