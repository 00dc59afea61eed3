"""Options of a sparse layer: router, capacity, dispatch and experts."""

import dataclasses
from collections.abc import Iterator
from typing import Self

from moe_jax.config import Options, choice, fields_of, option
from moe_jax.layers.experts import (
  DISPATCHES,
  EXPERTS,
  Dispatch,
  ExpertOptions,
  SharedExpertOptions,
  Twin,
)
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import ROUTERS, Causality, RouterOptions, Sizes
from moe_jax.layers.routers.contract import no_choices_taken
from moe_jax.routing import MoeAux, empty_aux
from moe_jax.routing.capacity import CAPACITIES, Capacity
from moe_jax.routing.rules_without_logits import AT_RANDOM, FORCED, IN_TURN


@dataclasses.dataclass(frozen=True)
class MoeOptions(Options):
  """The options of the sparse layers of a model, mixtures of experts."""

  num_experts: int = option(
    8,
    'Number E of experts in each sparse layer; 0: the dense twin, in which a '
    'dense feed-forward has the FLOPs per token of num_selected experts.',
    minimum=0,
  )
  num_selected: int = option(
    1,
    'Number K of experts that each token chooses. Where experts choose tokens, '
    'it only enters into their capacity.',
    minimum=1,
  )
  layers: str = option(
    'every 2',
    "Layers that are sparse: 'every N' (the last of each N), 'last N', 'all', "
    "'none', or the numbers of layers, counted from 0: '1,3'.",
  )
  group_size: int = option(
    0,
    'Number S of tokens in a group, which is routed by itself with its own '
    'capacity and balance; a divisor or a multiple of the length of a '
    'sequence. 0: one sequence; -1: the whole batch.',
    minimum=-1,
  )
  extra_ffn: bool = option(
    False,
    'Whether a dense feed-forward with a norm and a residual of its own '
    'follows each sparse layer (ST-MoE, OpenMoE).',
  )
  output_masking: float = option(
    0.0,
    "Rate at which an expert's output for a token is masked in training, "
    'without scaling up the others; in evaluation outputs are multiplied by 1 '
    "- rate (NLLB's expert output masking, arXiv:2207.04672). 0.0 masks "
    'nothing.',
    minimum=0,
    below=1,
  )
  layer_reduce: str = option(
    'sum',
    'Reduction of the router losses of all sparse layers to one number: '
    "'sum' (Switch) or 'mean'.",
    choices=('sum', 'mean'),
    same_function=True,
  )
  allow_future_leak: bool = option(
    False,
    'Whether a causal model may have a router whose choices for a token depend '
    'on later tokens; if it has one, the run says so at its start.',
    same_function=True,
  )
  router: RouterOptions = choice(
    ROUTERS,
    'token_choice',
    'Router of the sparse layers: the rule by which tokens go to experts.',
  )
  capacity: Capacity = choice(
    CAPACITIES,
    'per_token',
    'Rule for the capacity, the number of slots of an expert in each group.',
  )
  expert: ExpertOptions = choice(
    EXPERTS, 'feed_forward', 'Kind of network that each expert is.'
  )
  shared_expert: SharedExpertOptions = option(
    SharedExpertOptions(),
    'Expert of the sparse layers that every token meets beside its chosen ones '
    '(DeepSeekMoE, arXiv:2401.06066); the dense twin is wider by it.',
  )
  dispatch: Dispatch = choice(
    DISPATCHES,
    'gather',
    'Way in which tokens move to their experts and back, and are multiplied.',
    same_function=True,
  )
  retained: Retained = option(
    Retained(),
    'Experts of the sparse layers that merging or pruning left with fewer.',
  )
  force_balance: str = option(
    '',
    'Choice of experts whatever the logits are, for measurements of speed: '
    f'{IN_TURN!r} gives choices to the experts in turn, {AT_RANDOM!r} draws '
    'them, anew at each step in training. In generation a row has the same '
    'experts at every token. Gates are those of the logits. An empty string '
    'leaves the choice to the router.',
    choices=('', *FORCED),
  )
  replay: str = option(
    '',
    'Folder of the trace of another run on the same batches, whose choices of '
    'experts and drops each training step takes over from its record of the '
    'step; evaluations choose by themselves. An empty string leaves the choice '
    'to the router.',
    same_function=True,
  )

  @property
  def sizes(self) -> Sizes:
    """E, K and the capacity, for the methods of the router's options."""
    return Sizes(self.num_experts, self.num_selected, self.capacity)

  @property
  def causality(self) -> Causality:
    """How the router's choices depend on later tokens and on the capacity."""
    return self.router.causality(self.sizes)

  @property
  def num_retained(self) -> int:
    """The number of experts that a layer has: E unless some are merged."""
    rows = self.retained.rows.values()
    return max(map(max, rows)) + 1 if rows else self.num_experts

  def expert_slots(self, slots: int, group_size: int) -> int:
    """The number of slots of an expert in a group, where experts may be merged.

    A merged expert has the slots of all router columns that lead to it, and all
    experts have as many as the expert with the most columns.

    Args:
      slots: The number of slots of a column.
      group_size: The number of tokens in a group, each of which chooses K
        columns.
    """
    rows = self.retained.rows.values()
    if not rows:
      return slots
    most = max(row.count(expert) for row in rows for expert in row)
    return min(most * slots, min(most, self.num_selected) * group_size)

  @property
  def forced(self) -> str:
    """The warning that `force_balance` forces choices; '' where it does not.

    Every output of a model with forced choices has to show this text.
    """
    if not self.force_balance:
      return ''
    return (
      f'moe.force_balance={self.force_balance!r}: experts are chosen whatever '
      "the router's logits are; speeds are those of such loads, and losses are "
      'not those of a model with a router'
    )

  def replays(self) -> str | None:
    """The reason why no choices can be imposed on a layer; None if they can."""
    if self.retained.rows:
      return (
        'columns of the router lead to merged experts, and a choice of an '
        'expert does not say by which column'
      )
    return no_choices_taken(self.router)

  def leak(self) -> str | None:
    """The reason why later tokens change earlier outputs; None if they do not.

    It lies in the router, or in the exchange of rows between devices.
    """
    dispatch = self.dispatch
    return self.causality.leak or dispatch.exchange.leak(dispatch.shadowing)

  def in_layer(self, layer: int) -> 'MoeOptions':
    """The options of one layer, where pruning or merging left fewer experts.

    Layers with equally many experts have equal options. The result is `self`
    if no layer has lost experts.
    """
    if not self.retained.layers:
      return self
    E = self.retained.counts.get(layer, self.num_experts)
    retained = self.retained.like(layer)
    return dataclasses.replace(self, num_experts=E, retained=retained)

  def problems(self) -> Iterator[str]:
    """Yields a text for each conflict between options of the layer.

    Conflicts are between router, capacity, dispatch and experts.
    """
    if not self.num_experts:
      return
    yield from self.router.problems_with(self.sizes)
    yield from self._imposed_problems()
    yield from self.retained.problems_with(self.router, self.sizes)
    yield from self.expert.problems_with(self.dispatch)
    if self.shared_expert.hidden and not self.expert.has_width:
      yield (
        f'shared_expert.hidden={self.shared_expert.hidden} beside experts of '
        f'{type(self.expert).__name__}, which have no width: only feed-forward '
        'experts have a shared one'
      )
    if self.router.mixes and not self.dispatch.by_mask:
      yield (
        f'dispatch.kind={DISPATCHES.name_of(self.dispatch)!r} moves whole '
        f'tokens, and router.kind={ROUTERS.name_of(self.router)!r} mixes them '
        "in every slot; use the dispatch 'einsum'"
      )
    if self.router.mixes and self.expert.format is not None:
      yield (
        f'router.kind={ROUTERS.name_of(self.router)!r} mixes tokens in every '
        'slot, and experts in codes have rows of whole tokens'
      )
    if not self.dispatch.drops and self.causality.drops:
      yield (
        f'dispatch.kind={DISPATCHES.name_of(self.dispatch)!r} has no slots, '
        f'and capacity.kind={CAPACITIES.name_of(self.capacity)!r} drops '
        "tokens; use the capacity 'all', or the dispatch 'gather' or 'sorted'"
      )

  def _imposed_problems(self) -> Iterator[str]:
    """The reasons, as texts, why `force_balance` or `replay` cannot be had."""
    forced, replay, router = self.force_balance, self.replay, self.router
    if forced and replay:
      yield (
        f'force_balance={forced!r} with replay={replay!r}: experts are chosen '
        'by one of them'
      )
    elif forced or replay:
      reason = self.replays()
      if forced and router.by_expert and not router.mixes:
        name = type(router).__name__
        reason = f'the experts of {name} choose tokens, equally many each'
      if reason is not None:
        name = 'force_balance' if forced else 'replay'
        yield f'{name}={forced or replay!r}: {reason}'

  def within(self, ffn: FfnOptions, dropout: float) -> 'MoeOptions':
    """The layer's options, with experts' defaults filled in from the model's.

    Args:
      ffn: The model's options of dense feed-forward layers.
      dropout: The model's rate of dropout.
    """
    return dataclasses.replace(self, expert=self.expert.within(ffn, dropout))

  def twin(self) -> Twin:
    """The feed-forward layer that replaces these experts in the dense twin.

    The layer is as wide as K experts and the shared expert together. The
    options need the defaults that `within` fills in.
    """
    twin = self.expert.twin(self.num_selected)
    return twin.of_width(twin.ffn.hidden + self.shared_expert.hidden)

  @property
  def shared_twin(self) -> Twin | None:
    """The feed-forward layer of the shared expert; None if there is none.

    The options need the defaults that `within` fills in.
    """
    width = self.shared_expert.hidden
    return self.expert.twin(1).of_width(width) if width else None

  def dense_aux(self) -> MoeAux:
    """Zeros as the losses and statistics of a dense layer among sparse ones."""
    if not self.num_experts:
      return empty_aux(1, 1)
    losses = self.router.loss_weights()
    return empty_aux(self.num_experts, self.num_selected, losses)

  def shrunk(self) -> Self:
    """These options at a laptop's size, with E and K that the router allows."""
    fields = {name: getattr(self, name) for name in fields_of(type(self))}
    parts = {n: v.shrunk() for n, v in fields.items() if isinstance(v, Options)}
    router, capacity = self.router.shrunk(), self.capacity.shrunk()
    E, K = min(self.num_experts, 4), self.num_selected
    preferred = sizes = Sizes(E, K if K <= 4 else 2, capacity)
    if E:
      tried = (preferred, *(Sizes(4, k, capacity) for k in (2, 4, 1)))
      fitting = (s for s in tried if not any(router.problems_with(s)))
      sizes = next(fitting, preferred)
    # All parts change at once, as the small router may not allow the old sizes.
    return dataclasses.replace(
      self,
      **parts,
      num_experts=sizes.num_experts,
      num_selected=sizes.num_selected,
      group_size=min(self.group_size, 64),
    )
