"""Soft MoE: slots are mixtures of tokens, and tokens mixtures of slots.

https://arxiv.org/abs/2308.00951. Soft MoE is for encoders alone, as every
output depends on all tokens of its group. A group is an example or a part of an
example, as a slot would mix the tokens of several examples. The rule is
`moe_jax.routing.soft_rule`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from moe_jax.config import option
from moe_jax.layers import parameters
from moe_jax.layers.routers import contract, steps
from moe_jax.routing.capacity import CAPACITIES
from moe_jax.routing.soft_rule import soft_logits, soft_routing


@dataclasses.dataclass(frozen=True)
class Soft(contract.RouterOptions):
  """The options of Soft MoE; `slots_per_expert` stands for a capacity."""

  by_expert: ClassVar[bool] = True
  mixes: ClassVar[bool] = True

  slots_per_expert: int = option(
    1,
    'Number p of slots of each expert in a group, each with parameters of its '
    'own (arXiv:2308.00951); num_experts * p slots are multiplied, whatever '
    'the length of the group is.',
    minimum=1,
  )

  def problems_with(self, sizes):
    yield from super().problems_with(sizes)
    if sizes.capacity.binds:
      yield (
        f'capacity.kind={CAPACITIES.name_of(sizes.capacity)!r}: the slots of '
        "router.kind='soft' are its slots_per_expert, and no token is dropped; "
        "use 'all'"
      )

  def module(self, sizes, shared, name=None):
    return SoftRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality(
      "router.kind='soft' mixes all tokens of a group in every slot, so that "
      "later tokens change earlier outputs; use 'token_choice'",
      undecodable=(
        'Soft MoE mixes all tokens of a group, and later ones do not exist yet '
        'while a text is generated; an encoder can have this router'
      ),
      room_in_generation=False,  # slots mix as in training
    )


class SoftRouter(contract.Router):
  """A router whose logits are scaled cosines of tokens and slots' vectors."""

  options: Soft

  def route(self, x, mask, train, token_info, layer):
    E, M, p = self.sizes.num_experts, x.shape[-1], self.options.slots_per_expert
    kernel = parameters.kernel(
      self.shared,
      (*steps.AXES, None),
      role=steps.ROLE,
      in_axis=0,
      out_axis=(1, 2),
    )
    w = self.param('w', kernel, (M, E, p), jnp.float32)
    init = parameters.scale((None,), role=steps.ROLE)
    scale = self.param('scale', init, (1,), jnp.float32)
    chosen = soft_routing(soft_logits(x, w, scale), mask)
    return chosen, steps.choice_aux(self, {}, chosen, None, mask)
