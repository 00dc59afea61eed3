"""Expert choice: each expert picks the tokens it wants most.

https://arxiv.org/abs/2202.09368. The capacity is the number of tokens that an
expert takes; with room for all, every expert takes every token. The rule is
`moe_jax.routing.expert_choice_rule`.
"""

import dataclasses
from typing import ClassVar

from moe_jax import routing
from moe_jax.layers.routers.by_expert import (
  LEAK,
  ByExpert,
  slot_aux,
  taken_by,
)
from moe_jax.layers.routers.contract import Router
from moe_jax.layers.routers.linear_gate import jittered, linear_logits
from moe_jax.partitioning import on_each_device


@dataclasses.dataclass(frozen=True)
class ExpertChoice(ByExpert):
  """The options of expert choice."""

  takes_choices: ClassVar[bool] = True

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return ExpertChoiceRouter(self, sizes, shared, name=name)

  def leak(self, sizes):
    """A leak, as picks depend on all tokens, unless every token is picked."""
    return LEAK if sizes.capacity.binds else None

  def decodes(self, sizes):
    """None with room for all; else experts need several tokens to choose."""
    if not sizes.capacity.binds:
      return None
    return (
      'expert choice does not decode token by token: its experts choose among '
      "a group's tokens; evaluate the model by its loss, or train one with "
      'another router'
    )

  def serving_all(self, sizes):
    """None: experts choose as in training, as room for all is another model."""
    return None


class ExpertChoiceRouter(Router):
  """A linear layer, then expert choice; see `Router`."""

  options: ExpertChoice

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del router_ids, layer
    logits = linear_logits(self, jittered(self, x, train))
    capacity = self.sizes.slots(x.shape[1])

    def choose(logits, mask, may_take):
      return routing.expert_choice(
        logits, capacity=capacity, mask=mask, taken_by=may_take
      )

    may_take = taken_by(given, self.sizes.num_experts)
    chosen = on_each_device(choose, (logits, mask, may_take))
    return chosen, slot_aux(self, chosen, logits, mask)
