"""SparseMixer, the router of Phi-3.5-MoE: experts are drawn in training.

https://arxiv.org/abs/2409.12136. The rule is in
`moe_jax.routing.sparse_mixer_rule`.
"""

import dataclasses
from typing import ClassVar

from moe_jax import routing
from moe_jax.config import option
from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.routing.aux_losses import choice_losses
from moe_jax.routing.sparse_mixer_rule import sparse_mixer


@dataclasses.dataclass(frozen=True)
class SparseMixer(contract.RouterOptions):
  """The options of SparseMixer; in GRIN and Phi-3.5-MoE K is 2."""

  takes_choices: ClassVar[bool] = True
  by_logits: ClassVar[bool] = True

  slot_priority: str = shared_options.SLOT_PRIORITY_WITHOUT_PROBABILITY
  jitter: float = shared_options.JITTER
  use_bias: bool = shared_options.USE_BIAS
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT
  balance_weight: float = shared_options.BALANCE_WEIGHT
  balance_choices: str = shared_options.BALANCE_CHOICES
  sequence_balance_weight: float = shared_options.SEQUENCE_BALANCE_WEIGHT
  batch_balance_weight: float = shared_options.BATCH_BALANCE_WEIGHT
  batch_balance_rows: int = shared_options.BATCH_BALANCE_ROWS
  global_balance_weight: float = shared_options.GLOBAL_BALANCE_WEIGHT
  balance_scores: str = shared_options.BALANCE_SCORES
  threshold: float = option(
    0.02,
    "Largest distance of an expert's logit from the largest logit that is "
    'left at which the expert still takes part in a choice, as a fraction of '
    'the larger of that logit and the size of its own (2 * '
    'router_jitter_noise in Phi checkpoints); 0.0: the largest alone.',
    minimum=0,
  )

  def problems_with(self, sizes):
    yield from super().problems_with(sizes)
    yield from steps.scope_problems(self, sizes)

  def module(self, sizes, shared, name=None):
    return SparseMixerRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality.of_queues(sizes, self.slot_priority)


class SparseMixerRouter(contract.Router):
  """The router that applies SparseMixer to the logits of a linear layer."""

  options: SparseMixer

  def route(self, x, mask, train, token_info, layer, given=None):
    o, sizes = self.options, self.sizes
    x = steps.jittered(self, x, o.jitter, train)
    logits = steps.linear_logits(self, x, o.use_bias)
    index, gate = sparse_mixer(
      logits,
      num_selected=sizes.num_selected,
      threshold=o.threshold,
      key=self.make_rng(contract.NOISE) if train else None,
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
    losses = choice_losses(
      logits, index, gate, mask, o.balance_choices, o.balance_scores
    )
    losses |= steps.scope_losses(self, logits, index, mask)
    return chosen, steps.choice_aux(self, losses, chosen, logits, mask)
