"""Experts with slots: the same number of rows for each, filled or not.

Rows are `[E, R, M]`. Where experts are split over the devices of a mesh, rows
travel between these (`moe_jax.parallel.exchange`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.config import choice, option
from moe_jax.errors import InputError
from moe_jax.layers import parameters
from moe_jax.layers.experts.serving import (
  ROLE,
  SCOPE,
  Dispatch,
  ExpertOptions,
  Experts,
)
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.shared import Shared
from moe_jax.parallel.exchange import EXCHANGES, Exchange
from moe_jax.parallel.layout import layout_of
from moe_jax.parallel.shadowing import Shadowing
from moe_jax.parallel.slot_trip import SlotTrip, StackedExperts
from moe_jax.routing import AnyRouting, ExchangeStats
from moe_jax.routing.dispatch import Dispatcher, einsum, gather
from moe_jax.shapes import Array, Float, Leaf, Shaped, type_text


@dataclasses.dataclass(frozen=True)
class Gather(Dispatch):
  """The dispatch into slots that gathers rows by index, O(S K M) for a group.

  Attributes:
    dispatcher: The movement of tokens to slots and back.
  """

  dispatcher: ClassVar[Dispatcher] = gather

  exchange: Exchange = choice(
    EXCHANGES,
    'constraint',
    'Exchange by which expert rows travel between devices where experts are '
    'split over several; it has no effect on one device.',
  )
  shadowing: Shadowing = option(
    Shadowing(),
    'Experts that are sent to all devices, while their tokens stay.',
  )

  def leak(self):
    """Shadowed experts are chosen by all tokens and leave room for others."""
    fraction = self.exchange.capacity_fraction
    if fraction == 1.0 or not self.shadowing.experts:
      return None
    return (
      f'dispatch: exchange.capacity_fraction={fraction} drops rows that '
      f'shadowing.experts={self.shadowing.experts} may spare, as all tokens '
      'decide, so that later tokens change earlier outputs; use '
      'capacity_fraction=1.0'
    )

  def feed_forward(self, layer: FfnLayer) -> Experts:
    return FeedForwardSlots(self, layer.shared, layer, name=SCOPE)

  def modules(self, expert: ExpertOptions, shared: Shared) -> Experts:
    return ModuleSlots(self, shared, expert, name=SCOPE)


@dataclasses.dataclass(frozen=True)
class Einsum(Gather):
  """The dispatch by products with one-hot masks: the readable reference."""

  by_mask: ClassVar[bool] = True
  dispatcher: ClassVar[Dispatcher] = einsum


class SlotExperts(Experts):
  """The base of the modules of experts that have slots.

  Attributes:
    dispatch: The dispatch that moves tokens into slots and back.
    shared: The settings that all layers of the model share.
  """

  dispatch: Gather
  shared: Shared

  def _in_slots(
    self,
    experts: Callable[[Array], Array] | StackedExperts,
    x: Float[Array, 'G S M'],
    routing: AnyRouting,
    hidden: int = 1,
  ) -> tuple[Float[Array, 'G S M'], ExchangeStats | None]:
    """The gated sums of the outputs experts(rows [E, R, M]).

    Args:
      experts: The function of rows.
      x: The groups.
      routing: The routing of the groups.
      hidden: The hidden width F of an expert; 1 where it is not to be split.
    """
    how, dispatcher = self.dispatch, self.dispatch.dispatcher
    layout = layout_of(
      self.shared.rules, x, num_experts=routing.num_experts, hidden=hidden
    )
    if layout is not None and not self.is_initializing():
      trip = SlotTrip(layout, dispatcher, how.exchange, how.shadowing)
      return trip.serve(experts, x, routing)
    with jax.named_scope('dispatch'):
      rows = dispatcher.dispatch(x, routing)  # [E, R, M]
    rows = experts(rows)
    with jax.named_scope('combine'):
      return dispatcher.combine(rows, routing), None


class FeedForwardSlots(SlotExperts):
  """E independent feed-forward layers; expert e gets rows[e].

  Every expert starts from its own draw, with the fan-in of one expert. With
  E=1 it is the dense layer.

  Attributes:
    layer: The computation of one expert.
  """

  layer: FfnLayer

  def serve(self, x, routing, train):
    layer, E, M = self.layer, routing.num_experts, x.shape[-1]
    experts = StackedExperts(
      functools.partial(
        layer.compute, dropout=layer.dropout_module(self, train)
      ),
      layer.parameters(self, (E,), M),
      layer.axes((E,), M),
      layer.sizes(M, x.dtype),
    )
    return self._in_slots(experts, x, routing, layer.options.hidden)


class ModuleSlots(SlotExperts):
  """E copies of any module, each initialised independently.

  Attributes:
    options: The options of one expert.
  """

  options: ExpertOptions

  def serve(self, x, routing, train):
    module = self.options.module(self.shared, name='expert')

    def call(module, rows):
      y = self.options.call(module, rows, train)
      return as_rows(type(module).__name__, y, rows)

    output = self._in_slots(lambda rows: copied(call, module, rows), x, routing)
    give_role(self)
    return output


@dataclasses.dataclass(frozen=True)
class ModuleExpert(ExpertOptions):
  """Experts that are copies of a linen module, called as module(rows [R, M]).

  It is for Python; a config needs a class that extends `ExpertOptions`.

  Attributes:
    expert: The module that is copied.
  """

  expert: nn.Module

  def module(self, shared: Shared, name: str) -> nn.Module:
    """A copy of the module, which does not receive `shared`."""
    del shared
    return self.expert.copy(name=name)

  def call(self, module, rows, train):
    """The output of the module, which is not told `train`."""
    del train
    return module(rows)


def copied(
  call: Callable[..., Leaf],
  expert: nn.Module,
  *arguments: Shaped[Array, 'E ...'],
) -> Leaf:
  """The results of call(copy e of `expert`, *arguments[e]), stacked."""
  apply = nn.vmap(
    call,
    in_axes=0,
    out_axes=0,
    axis_size=len(arguments[0]),
    variable_axes={'params': 0},
    split_rngs={'params': True, 'dropout': True, 'router': True},
    metadata_params={nn.PARTITION_NAME: 'expert'},
  )
  return apply(expert, *arguments)


def as_rows(name: str, y: Any, rows: Array) -> Array:
  """An expert's output in the type of its rows.

  Raises:
    ValueError: The output is no array of numbers with a fraction, or has
      another shape than the rows.
  """
  dtype = getattr(y, 'dtype', np.int32)
  fits = jnp.issubdtype(dtype, jnp.floating) and y.shape == rows.shape
  if not fits:
    raise InputError(
      f'expert {name} returned {type_text(y)} for rows {type_text(rows)}; an '
      'expert returns rows [R, M] of the same shape'
    )
  return y.astype(rows.dtype)


def give_role(experts: nn.Module) -> None:
  """Gives the parameters of a user's module boxes with the role of experts."""
  if not experts.is_initializing():
    return
  for name, subtree in experts.variables['params'].items():
    subtree = parameters.with_role(subtree, ROLE, stacked=('expert',))
    experts.put_variable('params', name, subtree)
