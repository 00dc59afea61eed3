"""Token choice: each token chooses the K experts of its largest logits.

Switch (https://arxiv.org/abs/2101.03961), GShard, ST-MoE, Mixtral and Loss-Free
Balancing are settings of its options. The rule is
`moe_jax.routing.token_choice_rule`.
"""

import dataclasses
from typing import ClassVar

from moe_jax.layers.routers.balancing import (
  BalanceBias,
  BalanceLoss,
  ImportanceLoss,
  ZLoss,
  bias_of,
)
from moe_jax.layers.routers.by_token import (
  ByLogits,
  logits_aux,
  serve,
  to_experts,
)
from moe_jax.layers.routers.contract import Router
from moe_jax.layers.routers.linear_gate import (
  LinearGate,
  jittered,
  linear_logits,
)
from moe_jax.options import above, one_of, option
from moe_jax.routing.balance_bias import SCORES, biased_scores


@dataclasses.dataclass(frozen=True)
class TokenChoice(
  BalanceBias, ImportanceLoss, ZLoss, BalanceLoss, LinearGate, ByLogits
):
  """The options of token choice."""

  takes_choices: ClassVar[bool] = True

  balance_bias_scores: str = option(
    'sigmoid',
    "Scores to which the balancing bias is added: 'sigmoid' for gates "
    "'sigmoid' (Loss-Free Balancing), 'softmax' for all other gates, which no "
    'paper has with a balancing bias.',
    one_of(*SCORES),
    when={'balance_bias_rate': above(0)},
  )

  def problems(self):
    """The problem of biased scores that are not those of the gates."""
    if not self.keeps_state:
      return
    of_gates = 'sigmoid' if self.gates == 'sigmoid' else 'softmax'
    if self.balance_bias_scores != of_gates:
      yield (
        f'balance_bias_scores={self.balance_bias_scores!r} does not belong to '
        f'gates={self.gates!r}, whose scores are {of_gates!r}; Loss-Free '
        "Balancing has 'sigmoid' for both"
      )

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return TokenChoiceRouter(self, sizes, shared, name=name)


class TokenChoiceRouter(Router):
  """A linear layer, then token choice; see `Router`."""

  options: TokenChoice

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del router_ids
    logits, scores = linear_logits(self, jittered(self, x, train)), None
    bias = bias_of(self)
    if bias is not None:
      scores = biased_scores(logits, bias, self.options.balance_bias_scores)
    chosen, _ = serve(
      self, logits, mask, train, layer, scores=scores, given=given
    )
    aux = logits_aux(self, chosen, logits, logits, mask, layer)
    return to_experts(self, chosen, layer), aux
