"""The contract of a router: its options' methods, and its module's inputs.

A router is one file here: its options, which extend `RouterOptions`, and its
module, which extends `Router`. Nobody else asks which router it is. Pure rules
are in `moe_jax.routing`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

from flax import linen as nn

from moe_jax.config import Options, fields_of, required
from moe_jax.errors import InputError
from moe_jax.layers.routers.sizes import Sizes
from moe_jax.layers.shared import Shared
from moe_jax.routing.capacity import All
from moe_jax.routing.given_choice_rule import GivenChoices
from moe_jax.routing.rows import without_nan
from moe_jax.routing.soft_rule import AnyRouting
from moe_jax.routing.stats import MoeAux
from moe_jax.shapes import (
  Array,
  Bool,
  Float,
  Float32,
  Int,
  Int32,
  Leaf,
  UInt32,
  array_of,
  check_shapes,
  checked,
  shapes_in,
  type_text,
)

# The collection of routers' variables that no gradient updates.
ROUTER_STATE = 'router_state'
# The rng stream from which routers draw their noise.
NOISE = 'router'
# The collection of what is kept for analysis, if a caller makes it mutable.
SOWN = 'intermediates'
# The names there of a layer's choices, [B, T, N], and of its router's logits
# without noise, [G, S, E].
CHOICES, LOGITS = 'choices', 'router_logits'


class RoutedTokens(NamedTuple):
  """The arrays of a batch from which a router makes the ids that it needs.

  Attributes:
    tokens: int32 [B, T], token ids.
    previous: int32 [B, T], the token before each in its segment; -1 for the
      first.
    positions: int32 [B, T], the position of each token in its segment.
    segment_ids: int32 [B, T], the segment of each token in its row; 0 is
      padding.
    task_ids: int32 [B, T], the task of each token; None in a batch without.
  """

  tokens: Leaf
  previous: Leaf
  positions: Leaf
  segment_ids: Leaf
  task_ids: Leaf = None


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
    router_ids: UInt32[Array, 'G S'] | None = None,
    layer: int | Int[Array, ''] = 0,
    given: GivenChoices | None = None,
  ) -> tuple[AnyRouting, MoeAux]:
    """Routes each group by itself, without padding.

    Args:
      x: Token representations.
      mask: False for padding.
      train: Whether noise is drawn, from the rng stream 'router', and only
        where an option asks for it.
      router_ids: The ids that the options' `ids_of` returned for the tokens.
      layer: The number of the layer, by which routers without parameters
        differ.
      given: Choices that are imposed on the router. Gates, losses and
        statistics are computed from its own logits, as if it had made them.

    Returns:
      The routing, and the losses and statistics, which are sums over real
      tokens.

    Raises:
      ValueError: Shapes do not fit, the router takes no choices, or `route`
        breaks this contract.
    """
    x = without_nan(mask, x)
    if self.options.needs_ids and router_ids is None:
      raise InputError(
        f'{type(self).__name__} needs router_ids, the ids that ids_of of its '
        'options makes of a batch'
      )
    if given is None:
      result = self.route(x, mask, train, router_ids, layer)
    else:
      _check_given(self, given, mask)
      result = self.route(x, mask, train, router_ids, layer, given)
    _check_result(self, result, mask)
    return result

  def route(
    self,
    x: Array,
    mask: Array,
    train: bool,
    router_ids: Array | None,
    layer: int | Array,
    given: GivenChoices | None = None,
  ) -> tuple[AnyRouting, MoeAux]:
    """Routes; arguments and results are those of `__call__`.

    It is called in a compact method, and so may make parameters. It is called
    without `given` unless the router's options have `takes_choices`. It need
    not sow its choices, as the layer keeps those of the routing for analysis.
    """
    raise NotImplementedError


def _check_given(router: Router, given: GivenChoices, mask: Array) -> None:
  """Raises ValueError for choices that a router cannot be given."""
  reason = router.options.replays(router.sizes)
  if reason is not None:
    raise InputError(reason)
  K = 'K' if router.options.by_expert else f'{router.sizes.num_selected}'
  shapes = [
    array_of('mask', mask, Bool[Array, 'G S']),
    array_of('given.expert', given.expert, Int[Array, f'G S {K}']),
  ]
  if given.kept is not None:
    shapes.append(array_of('given.kept', given.kept, Bool[Array, f'G S {K}']))
  check_shapes(shapes)


def _check_result(router: Router, result: Any, mask: Array) -> None:
  """Raises ValueError where a router's result is not what `Router` says."""
  name, sizes = type(router).__name__, router.sizes
  if not (
    isinstance(result, tuple)
    and len(result) == 2
    and isinstance(result[0], AnyRouting)
    and isinstance(result[1], MoeAux)
  ):
    raise InputError(
      f'{name}.route returned {type_text(result)}; a Router returns '
      '(Routing or SoftRouting, MoeAux)'
    )
  chosen, aux = result
  if chosen.num_experts != sizes.num_experts:
    raise InputError(
      f'{name}.route returned a routing to num_experts={chosen.num_experts}; '
      f'the layer has {sizes.num_experts}'
    )
  weights = router.options.loss_weights()
  if aux.losses.keys() != weights.keys():
    raise InputError(
      f'{name}.route returned the losses {sorted(aux.losses)}; its options '
      f'give weights to {sorted(weights)}'
    )
  E = sizes.num_experts
  check_shapes(
    [
      array_of('mask', mask, Bool[Array, 'G S']),
      *shapes_in(f'the routing of {name}', chosen),
      array_of(f'stats.load of {name}', aux.stats.load, Float32[Array, f'{E}']),
      *(
        array_of(f'{loss} of {name}', value, Float32[Array, ''])
        for loss, value in aux.losses.items()
      ),
    ]
  )


class RouterOptions(Options):
  """Base of the routers' options, with the questions that others ask a router.

  Attributes:
    by_expert: Whether the tokens of an expert are not K choices of each token:
      experts choose tokens, and the module returns `Routing.of_slots`, or every
      expert serves all tokens (`mixes`).
    mixes: Whether experts take mixtures of all tokens of a group, so that the
      module returns a `SoftRouting`. No causal model can have it, and a group
      must not hold tokens of two examples.
    needs_ids: Whether the module needs `router_ids`, which `ids_of` makes.
    needs_tasks: Whether `ids_of` needs the task of each token.
    needs_whole_rows: Whether a group must not end within a row.
    has_columns: Whether tokens choose by logits, one for each column of the
      router's parameters along the axis 'expert_choice', and columns may be
      led to merged experts; see `Retained`.
    takes_choices: Whether the module's `route` takes choices that are imposed
      on it, its argument `given`.
  """

  by_expert: ClassVar[bool] = False
  mixes: ClassVar[bool] = False
  needs_ids: ClassVar[bool] = False
  needs_tasks: ClassVar[bool] = False
  needs_whole_rows: ClassVar[bool] = False
  has_columns: ClassVar[bool] = False
  takes_choices: ClassVar[bool] = False

  def problems_with(self, sizes: Sizes) -> Iterator[str]:
    """The problems that this router has with sizes, a text for each.

    A text begins with the option of the layer: 'num_selected=3'.
    """
    E, K = sizes.num_experts, sizes.num_selected
    if not 1 <= K <= E:
      yield f'num_selected={K} not in [1, num_experts={E}]'

  def problem_of_groups(self, groups: int) -> str | None:
    """The reason why batches of that many groups do not fit; None if they do.

    Args:
      groups: The number of groups of a microbatch.
    """
    del groups
    return None

  def problem_of_rows(self, rows: int, microbatches: int) -> str | None:
    """The reason why microbatches of that many rows do not fit, or None."""
    del rows, microbatches
    return None

  @required
  def module(
    self, sizes: Sizes, shared: Shared, name: str | None = None
  ) -> Router:
    """The router's linen module."""
    raise NotImplementedError

  @required
  def leak(self, sizes: Sizes) -> str | None:
    """The reason why later tokens change earlier outputs; None if they do not.

    The text is a clause with the reason and an alternative.
    """
    raise NotImplementedError

  def decodes(self, sizes: Sizes) -> str | None:
    """The reason why the router cannot decode by tokens; None if it can."""
    del sizes
    return None

  def replays(self, sizes: Sizes) -> str | None:
    """The reason why no choices can be imposed on it; None if they can."""
    if not self.takes_choices:
      return f'{type(self).__name__} makes its own choices and takes no others'
    return None

  def takes_balanced(self, sizes: Sizes) -> str | None:
    """The reason why no even choices can be imposed on it; None if they can."""
    return self.replays(sizes)

  def serving_all(self, sizes: Sizes) -> Sizes | None:
    """The sizes with room for all tokens, which generation uses.

    None if the router chooses in generation as in training, so that its layer
    stays as it is.
    """
    return dataclasses.replace(sizes, capacity=All())

  def drops(self, sizes: Sizes) -> bool:
    """Whether a choice can be dropped because its expert is full."""
    return sizes.capacity.binds

  def training_slots(self, sizes: Sizes, group_size: int) -> int:
    """The slots of an expert in training, in a group of `group_size` tokens."""
    return sizes.slots(group_size)

  @required
  def multiply_adds(self, sizes: Sizes, width: int) -> int:
    """The number of multiplications in the router's products for one token."""
    raise NotImplementedError

  def loss_weights(self) -> dict[str, float]:
    """The weight of each loss that the module returns, by its name.

    An option `<name>_weight` is the weight of the loss `<name>_loss`.
    """
    return {
      f'{name.removesuffix("_weight")}_loss': getattr(self, name)
      for name in fields_of(type(self))
      if name.endswith('_weight')
    }

  def ids_of(self, tokens: RoutedTokens) -> UInt32[Array, 'B T'] | None:
    """The number of each token by which the router goes; None if by none."""
    del tokens
    return None

  def of_task(
    self, sizes: Sizes, params: dict[str, Leaf], task: int
  ) -> tuple[Int32[Array, ' K'], Float32[Array, ' K']] | None:
    """The experts and gates of every token of a task; None where tokens differ.

    They are those of inference, without noise.

    Args:
      sizes: The sizes of the layer.
      params: The parameters of the module.
      task: The number of the task.
    """
    del sizes, params, task
    return None

  @property
  def keeps_state(self) -> bool:
    """Whether the module has variables in the collection 'router_state'."""
    return False

  def move_state(
    self,
    state: dict[str, Leaf],
    load: Float32[Array, '*L E'],
    rate: Leaf | None = None,
  ) -> dict[str, Leaf]:
    """The variables of the collection after an optimizer step.

    Args:
      state: The module's variables before the step; those of several layers
        may be stacked.
      load: The choices of each expert before drops, of the whole batch. It may
        be longer than the router's experts, by zeros.
      rate: The amount by which a step changes them; None: the option's value.
        It may be an array that the step has as an argument.
    """
    del load, rate
    return state

  def canonical(self, sizes: Sizes) -> Self:
    """The same router with defaults for options that have no effect.

    Two routers with equal canonical options make the same choices.
    """
    del sizes
    return self

  def for_encoder(self) -> Self:
    """The same router for an encoder, whose layers are counted anew."""
    return self


def sown(layer: Mapping[str, Any]) -> dict[str, Any]:
  """All that the modules of a layer kept for analysis, by name.

  Args:
    layer: The variables of one layer in the collection 'intermediates'.
  """
  values = {}
  for name, entry in layer.items():
    # Flax keeps what is sown in tuples.
    values |= {name: entry[0]} if isinstance(entry, tuple) else sown(entry)
  return values
