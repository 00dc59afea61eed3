"""Options, queues and losses of routers in which tokens choose experts."""

import dataclasses
import functools
from typing import ClassVar

from flax import linen as nn

from moe_jax import routing
from moe_jax.config import option
from moe_jax.layers.routers.contract import (
  LOGITS,
  NOISE,
  SOWN,
  Router,
  RouterOptions,
)
from moe_jax.partitioning import on_each_device
from moe_jax.routing.aux_losses import over_groups
from moe_jax.routing.capacity import CAPACITIES
from moe_jax.routing.given_choice_rule import GIVEN_PRIORITIES, GivenChoices
from moe_jax.routing.token_choice_rule import (
  GATES,
  SECOND_POLICIES,
  SLOT_PRIORITIES,
  choice_problems,
)
from moe_jax.shapes import Array, Bool, Float32, Int32


@dataclasses.dataclass(frozen=True)
class Queued(RouterOptions):
  """The options of a router whose tokens queue for the slots of experts."""

  slot_priority: str = option(
    'token_major',
    'Order in which experts serve the choices of a group: '
    "'token_major' is token by token, each with all its choices; "
    "'choice_major' is all first choices, then all second ones (GShard), which "
    'lets later tokens change earlier outputs.',
    choices=GIVEN_PRIORITIES,
  )

  def canonical(self, sizes):
    """The router with 'token_major' for every priority of the same effect.

    With room for all the order has no effect, and with K = 1 there is no second
    choice. A router may leak for other reasons as well.
    """
    if Queued.leak(self, sizes) is not None:
      return self
    return dataclasses.replace(self, slot_priority='token_major')

  def leak(self, sizes):
    """The reason why slots not taken in the order of tokens leak the future.

    Under token-major slots whether a token is served depends on earlier ones.
    Choice-major slots let a later token's first choice evict an earlier one's
    second, and batch priority sorts by the whole group.
    """
    K = sizes.num_selected
    priorities = ('token_major', 'choice_major') if K == 1 else ('token_major',)
    if not sizes.capacity.binds or self.slot_priority in priorities:
      return None
    return (
      f'slot_priority={self.slot_priority!r} with num_selected={K} lets later '
      'tokens change earlier outputs wherever capacity binds; use '
      "slot_priority='token_major'"
    )


@dataclasses.dataclass(frozen=True)
class Gated(RouterOptions):
  """The options of a router whose gates are computed from its logits."""

  has_columns: ClassVar[bool] = True
  second_policy: ClassVar[str] = 'all'

  gates: str = option(
    'raw',
    "Gates, the weights of a token's chosen experts: 'raw' is the softmax over "
    "all experts (Switch); 'renormalized' makes the K gates sum to one before "
    'any choice is dropped (GShard, ST-MoE, Mixtral); '
    "'renormalized_after_drop' makes those of served choices sum to one "
    "(praxis); 'sigmoid' is the sigmoid of each logit (Loss-Free Balancing), "
    "and 'sigmoid_renormalized' divides these by the sum of the K chosen ones "
    'plus 1e-20 (DeepSeek-V3).',
    choices=GATES,
  )

  def problems_with(self, sizes):
    """The problems that gates and second policy have with E and K."""
    yield from choice_problems(
      num_experts=sizes.num_experts,
      num_selected=sizes.num_selected,
      gates=self.gates,
      second_policy=self.second_policy,
    )


@dataclasses.dataclass(frozen=True)
class Roomy(Gated):
  """The options of a router by logits for layers that drop nothing.

  All tokens of a sentence or a task go to the same experts, where a capacity
  would drop most. So there is no queue to order, and every choice is sent.
  """

  slot_priority: ClassVar[str] = 'token_major'
  second_threshold: ClassVar[float] = 1.0

  def problems_with(self, sizes):
    """The problems of gates, and of a capacity that can bind."""
    yield from super().problems_with(sizes)
    if sizes.capacity.binds:
      yield (
        f'capacity.kind={CAPACITIES.name_of(sizes.capacity)!r} can drop most '
        'tokens of a sentence or a task, which all choose the same experts; '
        "use 'all'"
      )


@dataclasses.dataclass(frozen=True)
class ByLogits(Queued, Gated):
  """The options of a router whose tokens choose the K largest logits."""

  slot_priority: str = option(
    'token_major',
    'Order in which experts serve the choices of a group: '
    "'token_major' is token by token, each with all its choices; "
    "'choice_major' is all first choices, then all second ones (GShard); "
    "'batch_priority' is choice-major with the tokens ordered by their largest "
    'probability (V-MoE, arXiv:2106.05974). The last two let later tokens '
    'change earlier outputs.',
    choices=SLOT_PRIORITIES,
  )
  second_policy: str = option(
    'all',
    "Choices after a token's first that are sent to experts in training: "
    "'all'; 'sampled', with K=2, with probability 2 * gate (Algorithm 1 of "
    "GShard); or 'threshold', with probability gate / second_threshold "
    '(ST-MoE, section C.2).',
    choices=SECOND_POLICIES,
    same_function=True,
  )
  second_threshold: float = option(
    0.2,
    "Renormalised gate from which on second_policy='threshold' always sends a "
    'choice after the first.',
    above=0,
    maximum=1,
    same_function=True,
  )

  def problems(self):
    """The problem of a threshold that no policy reads."""
    yield from super().problems()
    if self.second_policy != 'threshold':
      reason = "unless second_policy is 'threshold'"
      yield from self.in_vain(reason, 'second_threshold')


def serve(
  module: Router,
  logits: Float32[Array, 'G S E'],
  mask: Bool[Array, 'G S'],
  train: bool,
  *,
  scores: Float32[Array, 'G S E'] | None = None,
  spare: int = 0,
  expert_index: Int32[Array, 'G S K'] | None = None,
  given: GivenChoices | None = None,
) -> tuple[routing.Routing, Int32[Array, 'G S N']]:
  """The routing of `ByLogits`, and the experts of the largest scores.

  Args:
    module: The router; its options are `ByLogits` or `Roomy`.
    logits: The logits that gates are computed from, with noise if any.
    mask: False for padding.
    train: Whether the second policy draws.
    scores: The scores by which tokens choose. Default: the logits.
    spare: The number of experts that are returned beyond the K chosen ones; in
      all there are at most E.
    expert_index: The choices of tokens, where they are made already; they are
      returned instead.
    given: Choices that are imposed instead of those.
  """
  o, sizes = module.options, module.sizes
  E, K = sizes.num_experts, sizes.num_selected
  scores = logits if scores is None else scores
  if (ranked := expert_index) is None:
    ranked = largest(scores, min(K + spare, E))
  index = ranked[..., :K]
  if given is not None:
    index = given.in_place_of(index)
  draws = train and o.second_policy != 'all' and K > 1
  chosen = routing.token_choice(
    logits,
    num_selected=K,
    capacity=sizes.slots(logits.shape[1]),
    mask=mask,
    gates=o.gates,
    slot_priority=o.slot_priority,
    second_policy=o.second_policy,
    second_threshold=o.second_threshold,
    key=module.make_rng(NOISE) if draws else None,
    expert_index=index,
    given=given,
  )
  sow_choices(module, chosen.expert_index)
  return chosen, ranked


def largest(
  scores: Float32[Array, 'G S E'], count: int
) -> Int32[Array, 'G S N']:
  """The experts of each token's `count` largest scores, the largest first."""
  # It runs on each device, as no compiler splits a top-K over groups.
  choose = functools.partial(routing.choose, num_selected=count)
  return on_each_device(choose, (scores,))


def logits_aux(
  module: Router,
  chosen: routing.Routing,
  clean: Float32[Array, 'G S E'],
  gate: Float32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
) -> routing.MoeAux:
  """The losses and statistics of routers by logits, sums over real tokens.

  Args:
    module: The router.
    chosen: The routing.
    clean: The logits without noise, from which balance loss, z-loss and
      statistics are computed.
    gate: The gates of the choices, as if all were served.
    mask: False for padding.
  """
  module.sow(SOWN, LOGITS, clean)
  o, index, E = module.options, chosen.expert_index, chosen.num_experts
  probs = o.balance_probs(clean)
  balance = routing.balance_loss(probs, index, mask, o.balance_choices)
  importance = routing.importance_loss(gate, index, mask, E)
  return routing.empty_aux(E, index.shape[-1])._replace(
    losses={
      'balance_loss': over_groups(balance, mask),
      'z_loss': over_groups(routing.z_loss(clean, mask), mask),
      'importance_loss': over_groups(importance, mask),
    },
    stats=routing.routing_stats(chosen, clean, mask),
  )


def gates_of(
  module: Router,
  logits: Float32[Array, 'G S E'],
  chosen: routing.Routing,
) -> Float32[Array, 'G S K']:
  """The gates of a router's choices, as if all were served."""
  index = chosen.expert_index
  return routing.gates_before_drop(logits, index, module.options.gates)


def serve_evenly(
  module: Router,
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  given: GivenChoices | None = None,
) -> tuple[routing.Routing, routing.MoeAux]:
  """The routing of choices without logits, with gates of 1/K, and no losses.

  Args:
    module: The router; its options are `Queued`.
    expert_index: The choices.
    mask: False for padding.
    given: Choices that are imposed instead of these.
  """
  sizes = module.sizes
  if given is not None:
    expert_index = given.in_place_of(expert_index)
  chosen = routing.even_choice(
    expert_index,
    num_experts=sizes.num_experts,
    capacity=sizes.slots(mask.shape[1]),
    mask=mask,
    slot_priority=module.options.slot_priority,
    given=given,
  )
  sow_choices(module, expert_index)
  aux = routing.empty_aux(sizes.num_experts, sizes.num_selected)
  stats = routing.routing_stats(chosen, None, mask)
  return chosen, aux._replace(stats=stats)


def sow_choices(module: nn.Module, expert_index: Int32[Array, 'G S K']) -> None:
  """Keeps the choices for analysis, if 'intermediates' are mutable."""
  module.sow(SOWN, 'expert_index', expert_index)
