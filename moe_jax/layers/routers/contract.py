"""The contract of a router: the questions to its options, and its module.

A router is a file of this folder, with options, which extend `RouterOptions`,
and a module, which extends `Router`. Layers and models use the contract alone
and never ask which router they have. The rules, which are pure functions, are
in `moe_jax.routing`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from flax import linen as nn

from moe_jax import shapes
from moe_jax.config import Options, fields_of, required
from moe_jax.errors import InputError
from moe_jax.layers.shared import Shared
from moe_jax.routing.capacity import Capacity, PerToken
from moe_jax.routing.given_choice_rule import GivenChoices
from moe_jax.routing.rows import without_nan
from moe_jax.routing.soft_rule import AnyRouting
from moe_jax.routing.stats import MoeAux
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Leaf, checked

# The collection of routers' variables that no gradient updates.
ROUTER_STATE = 'router_state'
# The rng stream from which routers draw their noise.
NOISE = 'router'
# The collection of what is kept for analysis, if a caller makes it mutable.
SOWN = 'intermediates'
# The names in 'intermediates' of a layer's choices [B, T, N] (N is K or, where
# experts choose, E), of its routing, and of its logits without noise [G, S, E].
CHOICES, ROUTING, LOGITS = 'choices', 'routing', 'router_logits'


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of the layer that a router serves.

  Attributes:
    num_experts: E, the number of experts that a router tells apart: it has E
      logits for each token, and counts E loads.
    num_selected: K, the number of experts that a token chooses. Where experts
      choose tokens, K only enters into the capacity of experts.
    capacity: The rule for the number of a group's tokens that an expert serves.
    row_length: T, the number of tokens of a row of the batch; a group is a part
      of a row, or several rows. 0: a row is as long as a group.
    rows: The number of rows of a microbatch; 0 where it is not known.
    groups: The number of groups of a microbatch; 0 where it is not known.
    microbatches: The number of microbatches of a step; 0 where it is not known.
  """

  num_experts: int
  num_selected: int = 1
  capacity: Capacity = PerToken()
  row_length: int = 0
  rows: int = 0
  groups: int = 0
  microbatches: int = 0

  def slots(self, group_size: int) -> int:
    """The slots of an expert in a group of this size, a Python int."""
    E, K = self.num_experts, self.num_selected
    return self.capacity.per_expert(group_size, E, K)


class TokenInfo(NamedTuple):
  """The arrays of a batch that a router may read, besides representations.

  An array that no router reads is None. A router gets the arrays cut into
  groups, [G, S].

  Attributes:
    tokens: int [B, T], token ids.
    previous: int [B, T], the id of the token before each token in its segment;
      -1 for the first token.
    positions: int [B, T], the position of each token in its segment.
    segment_ids: int [B, T], the segment of each token in its row; 0 is padding.
    task_ids: int [B, T], the task of each token.
  """

  tokens: Leaf = None
  previous: Leaf = None
  positions: Leaf = None
  segment_ids: Leaf = None
  task_ids: Leaf = None

  def only(self, names: Iterable[str]) -> 'TokenInfo':
    """A copy that has the arrays of these names alone; the others are None."""
    return TokenInfo(**{name: getattr(self, name) for name in names})

  def shape_hints(self) -> dict[str, Any]:
    """The array type of each field that is not None, for `shapes.checked`."""
    given = (name for name, x in self._asdict().items() if x is not None)
    return dict.fromkeys(given, Int[Array, 'B T'])

  def static_sizes(self) -> dict[str, int]:
    """{}: `shapes.checked` learns all sizes from the shapes of the arrays."""
    return {}


class Causality(NamedTuple):
  """How a router's choices for a token depend on other tokens and a capacity.

  Attributes:
    leak: The reason why later tokens change earlier outputs, a clause that ends
      with what to choose instead; None if they do not.
    drops: Whether a choice can be dropped because its expert is full.
    undecodable: The reason why tokens cannot be routed one by one, as they are
      generated; None if they can.
    room_in_generation: Whether a model that generates may replace the capacity
      by room for all tokens; if not, its router chooses as in training.
  """

  leak: str | None
  drops: bool = False
  undecodable: str | None = None
  room_in_generation: bool = True

  @classmethod
  def of_queues(
    cls, sizes: Sizes, slot_priority: str = 'token_major'
  ) -> 'Causality':
    """The causality of a router whose tokens queue for the slots of experts.

    Under token-major slots whether a token is served depends on earlier tokens
    alone. Choice-major slots let the first choice of a later token evict the
    second choice of an earlier token, and batch priority orders the tokens of
    the whole group by their probabilities.
    """
    K, drops = sizes.num_selected, sizes.capacity.binds
    causal = ('token_major', 'choice_major') if K == 1 else ('token_major',)
    if not drops or slot_priority in causal:
      return cls(None, drops)
    leak = (
      f'slot_priority={slot_priority!r} with num_selected={K} lets later '
      'tokens change earlier outputs wherever capacity binds; use '
      "slot_priority='token_major'"
    )
    return cls(leak, drops)


class RouterOptions(Options):
  """Base of the routers' options, with all that layers and models ask of them.

  Attributes:
    by_expert: Whether tokens do not choose K experts each: either experts
      choose tokens, and the module returns `Routing.of_slots`, or every expert
      serves all tokens (`mixes`).
    mixes: Whether experts take mixtures of all tokens of a group, so that the
      module returns a `SoftRouting`. No causal model can have such a router,
      and a group must not hold tokens of two examples.
    takes_choices: Whether the module's `route` takes choices that are imposed
      on it, its argument `given`.
    has_columns: Whether tokens choose by logits, each of which comes from a
      column of the router's parameters (the axis 'expert_choice'), and several
      columns may lead to the same expert where experts are merged.
    reads: The fields of `TokenInfo` that the module reads. If 'segment_ids' is
      one of them, a group must not end within a row.
  """

  by_expert: ClassVar[bool] = False
  mixes: ClassVar[bool] = False
  takes_choices: ClassVar[bool] = False
  has_columns: ClassVar[bool] = False
  reads: ClassVar[tuple[str, ...]] = ()

  @required
  def module(
    self, sizes: Sizes, shared: Shared, name: str | None = None
  ) -> 'Router':
    """The router's linen module, for a layer of these sizes."""
    raise NotImplementedError

  @required
  def causality(self, sizes: Sizes) -> Causality:
    """How the choices for a token depend on other tokens and the capacity."""
    raise NotImplementedError

  def problems_with(self, sizes: Sizes) -> Iterator[str]:
    """The reasons why this router does not work with `sizes`, a text for each.

    A text begins with the option of the layer that is wrong: 'num_selected=3'.
    A size of the run that is 0 is not known, and is no problem.
    """
    E, K = sizes.num_experts, sizes.num_selected
    if not 1 <= K <= E:
      yield f'num_selected={K} not in [1, num_experts={E}]'

  def loss_weights(self) -> dict[str, float]:
    """The weight of each loss that the module returns, by its name.

    An option `<name>_weight` is the weight of the loss `<name>_loss`.
    """
    return {
      f'{name.removesuffix("_weight")}_loss': getattr(self, name)
      for name in fields_of(type(self))
      if name.endswith('_weight')
    }

  @property
  def keeps_state(self) -> bool:
    """Whether the module has variables in the collection 'router_state'."""
    return False

  @property
  def by_logits(self) -> bool:
    """Whether a token chooses the experts of its largest logits, but for noise.

    False is safe: analysis then does not explain choices by logits.
    """
    return self.has_columns and not self.keeps_state

  def move_state(
    self,
    state: dict[str, Leaf],
    load: Float32[Array, '*L E'],
    rate: Leaf | None = None,
  ) -> dict[str, Leaf]:
    """The variables of the collection 'router_state' after an optimizer step.

    Args:
      state: The module's variables before the step; the variables of several
        layers may be stacked.
      load: The number of choices of each expert in the whole batch, before
        drops. Zeros follow those of the router's experts where other layers
        have more experts.
      rate: The amount by which a step changes the variables; None: the option's
        value. It may be an array that is an argument of the compiled step.
    """
    return state


def no_choices_taken(options: RouterOptions) -> str | None:
  """The reason why no choices can be imposed on a router; None if they can."""
  if options.takes_choices:
    return None
  return f'{type(options).__name__} makes its own choices and takes no others'


class Router(nn.Module):
  """Base of the routers' modules, which are float32 whatever the model's dtype.

  Source: Table 2 of arXiv:2101.03961, selective precision.

  Attributes:
    options: The router's options.
    sizes: The sizes of the layer.
    shared: The settings that all layers of the model share; a router uses
      their initialisation of kernels.
  """

  options: Any
  sizes: Sizes
  shared: Shared = Shared()

  @nn.compact
  @checked
  def __call__(
    self,
    x: Float[Array, 'G S M'],
    mask: Bool[Array, 'G S'],
    train: bool = False,
    token_info: TokenInfo = TokenInfo(),
    layer: int | Int[Array, ''] = 0,
    given: GivenChoices | None = None,
  ) -> tuple[AnyRouting, MoeAux]:
    """Routes each group of tokens by itself; padding is not routed.

    Args:
      x: Token representations.
      mask: False for padding.
      train: Whether noise is drawn, from the rng stream 'router', and only
        where an option asks for it.
      token_info: The arrays that the router's options name in `reads`, [G, S]
        each.
      layer: The index of the layer; routers without parameters choose other
        experts in each layer.
      given: Choices that are imposed on the router; None imposes none. Gates,
        losses and statistics are computed from the router's own logits, as if
        it had made these choices.

    Returns:
      The routing, and the losses and statistics, which are sums over real
      tokens.

    Raises:
      ValueError: Shapes do not fit, an array that the router reads is missing,
        `given` is not taken, or `route` breaks this contract.
    """
    x = without_nan(mask, x)
    for name in self.options.reads:
      if getattr(token_info, name) is None:
        arrays = ', '.join(f'{name}=...' for name in self.options.reads)
        hint = f'others pass TokenInfo({arrays})'
        if name == 'task_ids':
          hint = (
            'batches have them where the data is a mixture, and callers of '
            f'generation give them; {hint}'
          )
        raise InputError(
          f'{type(self).__name__} goes by {name}, and no {name} are given: a '
          f'model makes them of its batch; {hint}'
        )
    if given is None:
      result = self.route(x, mask, train, token_info, layer)
    else:
      _check_given(self, given, mask)
      result = self.route(x, mask, train, token_info, layer, given)
    _check_result(self, result, mask)
    self.sow(SOWN, ROUTING, result[0])
    return result

  def route(
    self,
    x: Array,
    mask: Array,
    train: bool,
    token_info: TokenInfo,
    layer: int | Array,
    given: GivenChoices | None = None,
  ) -> tuple[AnyRouting, MoeAux]:
    """The routing of groups x [G, S, M], and its losses and statistics.

    `__call__`, which describes the arguments, is a compact method and calls
    this method, which may therefore make parameters. `given` is passed only if
    it is not None, so that routers whose options lack `takes_choices` need no
    such argument.
    """
    raise NotImplementedError


def _check_given(router: Router, given: GivenChoices, mask: Array) -> None:
  """Raises ValueError if choices of experts cannot be imposed on a router.

  They cannot if the router takes none, or if shapes or types are wrong.
  """
  if (reason := no_choices_taken(router.options)) is not None:
    raise InputError(reason)
  K = 'K' if router.options.by_expert else f'{router.sizes.num_selected}'
  arrays = [
    shapes.array_of('mask', mask, Bool[Array, 'G S']),
    shapes.array_of('given.expert', given.expert, Int[Array, f'G S {K}']),
  ]
  if (kept := given.kept) is not None:
    rule = Bool[Array, f'G S {K}']
    arrays.append(shapes.array_of('given.kept', kept, rule))
  shapes.check_shapes(arrays)


def _check_result(router: Router, result: Any, mask: Array) -> None:
  """Raises ValueError if `route` returned other types, losses or shapes."""
  name, E = type(router).__name__, router.sizes.num_experts
  is_pair = isinstance(result, tuple) and len(result) == 2
  chosen, aux = result if is_pair else (None, None)
  if not (isinstance(chosen, AnyRouting) and isinstance(aux, MoeAux)):
    raise InputError(
      f'{name}.route returned {shapes.type_text(result)}; a Router returns '
      '(Routing or SoftRouting, MoeAux)'
    )
  if chosen.num_experts != E:
    raise InputError(
      f'{name}.route returned a routing to num_experts={chosen.num_experts}; '
      f'the layer has {E}'
    )
  weights = router.options.loss_weights()
  if aux.losses.keys() != weights.keys():
    raise InputError(
      f'{name}.route returned the losses {sorted(aux.losses)}; its options '
      f'give weights to {sorted(weights)}; give it an option <loss>_weight '
      'for each (as in shared_options.py), or aux._replace(losses=...)'
    )
  load, rule = aux.stats.load, Float32[Array, f'{E}']
  arrays = [
    shapes.array_of('mask', mask, Bool[Array, 'G S']),
    *shapes.shapes_in(f'the routing of {name}', chosen),
    shapes.array_of(f'stats.load of {name}', load, rule),
  ]
  for loss, value in aux.losses.items():
    rule = Float32[Array, '']
    arrays.append(shapes.array_of(f'{loss} of {name}', value, rule))
  shapes.check_shapes(arrays)


def sown(layer: Mapping[str, Any]) -> dict[str, Any]:
  """All values that the modules of a layer kept for analysis, by name.

  Args:
    layer: The variables of one layer in the collection 'intermediates'.
  """
  values = {}
  for name, entry in layer.items():
    # Flax keeps what is sown in tuples.
    values |= {name: entry[0]} if isinstance(entry, tuple) else sown(entry)
  return values
