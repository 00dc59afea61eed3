"""SparseMixer, the router of Phi-3.5-MoE: experts are drawn in training.

https://arxiv.org/abs/2409.12136. The rule is in
`moe_jax.routing.sparse_mixer_rule`.
"""

import dataclasses
from typing import ClassVar

from moe_jax import routing
from moe_jax.config import option
from moe_jax.layers.routers.balance_scopes import (
  ScopedBalanceLoss,
  scoped_losses,
)
from moe_jax.layers.routers.balancing import ImportanceLoss, ZLoss
from moe_jax.layers.routers.by_token import Queued, logits_aux, sow_choices
from moe_jax.layers.routers.contract import NOISE, Router
from moe_jax.layers.routers.linear_gate import (
  LinearGate,
  jittered,
  linear_logits,
)
from moe_jax.routing.sparse_mixer_rule import sparse_mixer


@dataclasses.dataclass(frozen=True)
class SparseMixer(ScopedBalanceLoss, ImportanceLoss, ZLoss, LinearGate, Queued):
  """The options of SparseMixer; the paper and Phi-3.5-MoE choose K = 2."""

  takes_choices: ClassVar[bool] = True

  threshold: float = option(
    0.02,
    "Largest distance of an expert's logit from the largest logit that is "
    'left at which the expert still takes part in a choice, as a fraction of '
    'the larger of that logit and the size of its own (2 * '
    'router_jitter_noise in Phi checkpoints); 0.0: the largest alone.',
    minimum=0,
  )

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return SparseMixerRouter(self, sizes, shared, name=name)


class SparseMixerRouter(Router):
  """A linear layer, then SparseMixer; see `Router`."""

  options: SparseMixer

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del router_ids, layer
    o, sizes = self.options, self.sizes
    logits = linear_logits(self, jittered(self, x, train))
    index, gate = sparse_mixer(
      logits,
      num_selected=sizes.num_selected,
      threshold=o.threshold,
      key=self.make_rng(NOISE) if train else None,
      imposed=None if given is None else given.expert.astype('int32'),
    )
    chosen = routing.given_choice(
      index,
      gate,
      num_experts=sizes.num_experts,
      capacity=sizes.slots(mask.shape[1]),
      mask=mask,
      slot_priority=o.slot_priority,
      given=given,
    )
    sow_choices(self, index)
    aux = logits_aux(self, chosen, logits, gate, mask)
    aux.losses.update(scoped_losses(self, logits, index, mask))
    return chosen, aux
