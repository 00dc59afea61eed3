"""Token choice: each token chooses the K experts of its largest logits.

Switch (https://arxiv.org/abs/2101.03961), GShard, ST-MoE, Mixtral, Loss-Free
Balancing, OLMoE, Qwen3-MoE and DeepSeek-V2 and V3 are settings of its options.
The rule is `moe_jax.routing.token_choice_rule`.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

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
from moe_jax.layers.routers.contract import Router
from moe_jax.layers.routers.expert_groups import ExpertGroups, within_groups
from moe_jax.layers.routers.exploring import (
  Exploring,
  sampled,
  with_dropout,
)
from moe_jax.layers.routers.linear_gate import (
  ROUNDINGS,
  LinearGate,
  jittered,
  linear_logits,
)
from moe_jax.options import above, one_of, option
from moe_jax.routing.balance_bias import SCORES, biased_scores, scores_of
from moe_jax.routing.token_choice_rule import GATES
from moe_jax.shapes import Array, Float32


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
    above(0),
  )
  balance_bias_scores: str = option(
    'sigmoid',
    "Scores to which the balancing bias is added: 'sigmoid' for gates "
    "'sigmoid' (Loss-Free Balancing) and 'sigmoid_renormalized' (DeepSeek-V3), "
    "'softmax' for all other gates, which no paper has with a balancing bias.",
    one_of(*SCORES),
    when={'balance_bias_rate': above(0)},
  )
  logits_dtype: str = option(
    'float32',
    "Type to whose numbers the router's input, kernel, logits and gates are "
    "rounded: 'float32' rounds nothing, and 'bfloat16' has eight bits of a "
    'number (Table 2 of arXiv:2101.03961, whose models diverge with it). '
    'Sums, softmax and losses of the rounded logits stay float32.',
    one_of(*ROUNDINGS),
    how=True,
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
    if self.keeps_state and self.balance_bias_scores != self.gate_scores:
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
