"""Token choice: each token chooses the K experts of its largest logits.

Switch (https://arxiv.org/abs/2101.03961), GShard, ST-MoE, Mixtral, Loss-Free
Balancing, OLMoE, Qwen3-MoE and DeepSeek-V2 and V3 are settings of its options.
The rules are `moe_jax.routing.token_choice_rule` and `limited_rules`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config import option
from moe_jax.layers.routers.balance_scopes import (
  ScopedBalanceLoss,
  scoped_losses,
)
from moe_jax.layers.routers.balancing import (
  BalanceBias,
  ImportanceLoss,
  ZLoss,
  bias_of,
)
from moe_jax.layers.routers.by_token import (
  ByLogits,
  gates_of,
  logits_aux,
  serve,
)
from moe_jax.layers.routers.contract import NOISE, Router, RouterOptions
from moe_jax.layers.routers.linear_gate import (
  ROUNDINGS,
  LinearGate,
  jittered,
  linear_logits,
)
from moe_jax.partitioning import on_each_device
from moe_jax.routing.balance_bias import SCORES, biased_scores, scores_of
from moe_jax.routing.limited_rules import (
  GROUP_SCORES,
  OUTSIDE,
  group_problems,
  limited_scores,
)
from moe_jax.routing.token_choice_rule import GATES
from moe_jax.shapes import Array, Float32


@dataclasses.dataclass(frozen=True)
class Exploring(RouterOptions):
  """The options of a router that may try other experts in training.

  Source: Table 11 of arXiv:2101.03961 (Switch).
  """

  choice_policy: str = option(
    'largest',
    "Experts that a token chooses in training: 'largest' are those of its K "
    "largest scores; 'sampled' are drawn by the router's probabilities, "
    'without replacement; the gate of an expert does not depend on whether it '
    'was drawn. Evaluation always takes the largest.',
    choices=('largest', 'sampled'),
    same_function=True,
  )
  input_dropout: float = option(
    0.0,
    "Rate at which numbers of the router's input are dropped in training, and "
    'the others scaled up; experts see the whole input. 0.0 drops nothing.',
    minimum=0,
    below=1,
    same_function=True,
  )


def with_dropout(
  module: Router, x: Float32[Array, 'G S M'], train: bool
) -> Float32[Array, 'G S M']:
  """The router's input with the dropout of `Exploring`."""
  rate = module.options.input_dropout
  if not train or rate == 0:
    return x
  keep_mask = jax.random.bernoulli(module.make_rng(NOISE), 1.0 - rate, x.shape)
  return jnp.where(keep_mask, x / (1.0 - rate), 0.0)


def sampled(
  module: Router, logits: Float32[Array, 'G S E'], train: bool
) -> Float32[Array, 'G S E'] | None:
  """Scores whose K largest are a draw by the softmax; None where none is.

  Logits with Gumbel noise: their largest is drawn by the softmax, and the next
  ones by the softmax of those that are left (arXiv:1903.06059).
  """
  if not train or module.options.choice_policy == 'largest':
    return None
  key = module.make_rng(NOISE)
  return logits + jax.random.gumbel(key, logits.shape, logits.dtype)


@dataclasses.dataclass(frozen=True)
class ExpertGroups(RouterOptions):
  """The options of a router whose tokens may choose groups of experts first."""

  expert_groups: int = option(
    1,
    'Number of groups of consecutive experts, of which a token chooses some '
    "before it chooses experts in them (DeepSeek checkpoints' n_group: 8 in "
    'V3); 1: all experts are one group.',
    minimum=1,
  )
  chosen_expert_groups: int = option(
    1,
    'Number of groups of experts that each token chooses (topk_group: 4 in '
    'V3).',
    minimum=1,
  )
  expert_group_score: str = option(
    'best',
    "Score by which a token chooses a group of experts: its 'best' score "
    "(DeepSeek-V2), or the sum of its 'two_best' (DeepSeek-V3).",
    choices=GROUP_SCORES,
  )
  outside_expert_groups: str = option(
    'minus_infinity',
    "Score of experts outside of the chosen groups: 'minus_infinity' (V3), or "
    "'zero' (V2), with which they win over biased scores below zero.",
    choices=OUTSIDE,
  )

  def problems(self):
    """The problem of more chosen groups than there are."""
    yield from super().problems()
    chosen, groups = self.chosen_expert_groups, self.expert_groups
    if chosen > groups:
      yield f'chosen_expert_groups={chosen} is more than expert_groups={groups}'
    if groups == 1:
      names = 'expert_group_score', 'outside_expert_groups'
      yield from self.in_vain('unless expert_groups is at least 2', *names)

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
    """A token chooses one of two groups of experts."""
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


@dataclasses.dataclass(frozen=True)
class TokenChoice(
  Exploring,
  ExpertGroups,
  ScopedBalanceLoss,
  BalanceBias,
  ImportanceLoss,
  ZLoss,
  LinearGate,
  ByLogits,
):
  """The options of token choice."""

  takes_choices: ClassVar[bool] = True

  gate_scale: float = option(
    1.0,
    'Factor of all gates, the last step of their computation (DeepSeek '
    "checkpoints' routed_scaling_factor: 2.5 in V3).",
    above=0,
  )
  balance_bias_scores: str = option(
    'sigmoid',
    "Scores to which the balancing bias is added: 'sigmoid' for gates "
    "'sigmoid' (Loss-Free Balancing) and 'sigmoid_renormalized' (DeepSeek-V3), "
    "'softmax' for all other gates, which no paper has with a balancing bias.",
    choices=SCORES,
  )
  logits_dtype: str = option(
    'float32',
    "Type to whose numbers the router's input, kernel, logits and gates are "
    "rounded: 'float32' rounds nothing, and 'bfloat16' has eight bits of a "
    'number (Table 2 of arXiv:2101.03961, whose models diverge with it). '
    'Sums, softmax and losses of the rounded logits stay float32.',
    choices=ROUNDINGS,
    same_function=True,
  )

  @property
  def gate_scores(self) -> str:
    """The scores that the gates are computed from, one of `SCORES`."""
    return GATES[self.gates].scores

  def problems(self) -> Iterator[str]:
    """The problems of groups, of biased scores, and of drawn choices."""
    yield from super().problems()
    has_other_scores = self.keeps_state or self.expert_groups > 1
    if self.choice_policy == 'sampled' and has_other_scores:
      yield (
        "choice_policy='sampled' draws by the softmax of the logits, not by "
        f'balance_bias_rate={self.balance_bias_rate} or '
        f'expert_groups={self.expert_groups}; use '
        "choice_policy='largest' with these"
      )
    if not self.keeps_state:
      reason = 'unless balance_bias_rate is above 0'
      yield from self.in_vain(reason, 'balance_bias_scores')
    elif self.balance_bias_scores != self.gate_scores:
      yield (
        f'balance_bias_scores={self.balance_bias_scores!r} does not belong to '
        f'gates={self.gates!r}, whose scores are {self.gate_scores!r}; '
        "Loss-Free Balancing has 'sigmoid' for both"
      )

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return TokenChoiceRouter(self, sizes, shared, name=name)


class TokenChoiceRouter(Router):
  """A linear layer, then token choice; see `Router`."""

  options: TokenChoice

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del router_ids, layer
    x = with_dropout(self, jittered(self, x, train), train)
    rounded = ROUNDINGS[self.options.logits_dtype]
    logits = linear_logits(self, x, rounded=rounded)
    scores = sampled(self, logits, train)
    if scores is None:
      scores = self._scores(logits)
    chosen, _ = serve(self, logits, mask, train, scores=scores, given=given)
    gate = gates_of(self, logits, chosen)
    aux = logits_aux(self, chosen, logits, gate, mask)
    index = None if self.options.keeps_state else chosen.expert_index
    aux.losses.update(scoped_losses(self, logits, index, mask))
    chosen = dataclasses.replace(chosen, gate=rounded(chosen.gate))
    if (scale := self.options.gate_scale) != 1:
      chosen = dataclasses.replace(chosen, gate=chosen.gate * scale)
    return chosen, aux

  def _scores(
    self, logits: Float32[Array, 'G S E']
  ) -> Float32[Array, 'G S E'] | None:
    """The scores by which tokens choose; None where they are the logits."""
    o, bias = self.options, bias_of(self)
    if bias is not None:
      return within_groups(
        o, biased_scores(logits, bias, o.balance_bias_scores)
      )
    if o.expert_groups == 1:
      return None
    return within_groups(o, scores_of(logits, o.gate_scores))
