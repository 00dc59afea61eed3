"""Expert choice: each expert picks the tokens that it wants most.

https://arxiv.org/abs/2202.09368. The capacity is the number of tokens that an
expert takes of a group; if it is the size of the group, every expert takes all.
"""

import dataclasses
from typing import ClassVar

from moe_jax import routing
from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.partitioning import on_each_device


@dataclasses.dataclass(frozen=True)
class ExpertChoice(contract.RouterOptions):
  """The options of expert choice."""

  by_expert: ClassVar[bool] = True
  takes_choices: ClassVar[bool] = True

  jitter: float = shared_options.JITTER
  use_bias: bool = shared_options.USE_BIAS
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT

  def module(self, sizes, shared, name=None):
    return ExpertChoiceRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    """Later tokens change earlier outputs, unless experts take every token."""
    if not sizes.capacity.binds:
      return contract.Causality(None, room_in_generation=False)
    return contract.Causality(
      steps.EXPERTS_CHOOSE,
      undecodable=(
        'expert choice does not decode token by token: its experts choose '
        "among a group's tokens; evaluate the model by its loss, or train one "
        'with another router'
      ),
      room_in_generation=False,  # such a model would be another one
    )


class ExpertChoiceRouter(contract.Router):
  """The router whose experts choose by the logits of a linear layer."""

  options: ExpertChoice

  def route(self, x, mask, train, token_info, layer, given=None):
    x = steps.jittered(self, x, self.options.jitter, train)
    logits = steps.linear_logits(self, x, self.options.use_bias)
    capacity = self.sizes.slots(x.shape[1])

    def choose(logits, mask, may_take):
      return routing.expert_choice(
        logits, capacity=capacity, mask=mask, taken_by=may_take
      )

    may_take = given and given.may_take(self.sizes.num_experts)
    chosen = on_each_device(choose, (logits, mask, may_take))
    return chosen, steps.slot_aux(self, chosen, logits, mask)
