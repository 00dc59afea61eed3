"""Experts that serve slots: equally many rows for each, filled or not.

Rows are `[E, R, M]`. On a mesh they travel between devices, where experts are
split over those (`moe_jax.parallel.exchange`).
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.dispatch import einsum, gather
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
from moe_jax.options import choice
from moe_jax.parallel.exchange import EXCHANGES, Exchange, serve
from moe_jax.parallel.layout import layout
from moe_jax.routing import MoeAux, Routing, SlotRouting
from moe_jax.shapes import Array, Float, Leaf, Shaped


@dataclasses.dataclass(frozen=True)
class SlotDispatch(Dispatch):
  """The contract of dispatches into slots; each has its own two functions."""

  exchange: Exchange = choice(
    EXCHANGES,
    'constraint',
    'How rows travel to the devices of their experts, where those are split.',
  )

  def dispatch(
    self, x: Float[Array, 'G S M'], routing: Routing | SlotRouting
  ) -> Float[Array, 'E R M']:
    """Tokens to expert rows; empty slots are zero."""
    raise NotImplementedError

  def combine(
    self, rows: Float[Array, 'E R M'], routing: Routing | SlotRouting
  ) -> Float[Array, 'G S M']:
    """Expert rows back to tokens, weighted by the gates and summed."""
    raise NotImplementedError

  def feed_forward(self, layer: FfnLayer) -> Experts:
    """See `Dispatch.feed_forward`."""
    return FeedForwardSlots(self, layer.shared, layer, name=SCOPE)

  def modules(self, expert: ExpertOptions, shared: Shared) -> Experts:
    """See `Dispatch.modules`."""
    return ModuleSlots(self, shared, expert, name=SCOPE)


@dataclasses.dataclass(frozen=True)
class Gather(SlotDispatch):
  """Rows are gathered by index, O(S K M) for each group."""

  def dispatch(self, x, routing):
    """See `SlotDispatch.dispatch`."""
    return gather.dispatch(x, routing)

  def combine(self, rows, routing):
    """See `SlotDispatch.combine`."""
    return gather.combine(rows, routing)


@dataclasses.dataclass(frozen=True)
class Einsum(SlotDispatch):
  """Rows are products with one-hot masks: the readable reference."""

  by_mask: ClassVar[bool] = True

  def dispatch(self, x, routing):
    """See `SlotDispatch.dispatch`."""
    return einsum.dispatch(x, routing)

  def combine(self, rows, routing):
    """See `SlotDispatch.combine`."""
    return einsum.combine(rows, routing)


class SlotExperts(Experts):
  """What all experts that serve slots have in common.

  Attributes:
    dispatch: How tokens move into slots and back.
    shared: What the layers of the model share.
  """

  dispatch: SlotDispatch
  shared: Shared

  def _serve(
    self,
    experts: Callable[[Array], Array],
    x: Float[Array, 'G S M'],
    routing: Routing | SlotRouting,
  ) -> Float[Array, 'G S M']:
    """The gated sums of experts(rows [E, R, M])."""
    place = layout(self.shared.rules, x, num_experts=routing.num_experts)
    if place is not None and not self.is_initializing():
      return serve(
        self.dispatch.exchange, place, self.dispatch, experts, x, routing
      )
    with jax.named_scope('dispatch'):
      rows = self.dispatch.dispatch(x, routing)  # [E, R, M]
    rows = experts(rows)
    with jax.named_scope('combine'):
      return self.dispatch.combine(rows, routing)


class FeedForwardSlots(SlotExperts):
  """E independent feed-forward layers, expert e on rows[e].

  Every expert starts from its own draw, with the fan-in of one expert. With
  E=1 it is the dense layer.

  Attributes:
    layer: One of them.
  """

  layer: FfnLayer

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'G S M'],
    routing: Routing | SlotRouting,
    train: bool = False,
  ) -> tuple[Float[Array, 'G S M'], MoeAux | None]:
    """See `Experts`."""
    layer, E = self.layer, routing.num_experts
    p = layer.parameters(self, (E,), x.shape[-1])
    dropout = layer.dropped(self, train)

    def experts(rows):
      return layer.compute_stacked(p, rows, dropout)

    return self._serve(experts, x, routing), None


class ModuleSlots(SlotExperts):
  """E copies of any module, each with its own start.

  Attributes:
    options: What one of them is.
  """

  options: ExpertOptions

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'G S M'],
    routing: Routing | SlotRouting,
    train: bool = False,
  ) -> tuple[Float[Array, 'G S M'], MoeAux | None]:
    """See `Experts`."""
    module = self.options.module(self.shared, name='expert')

    def call(module, rows):
      return self.options.call(module, rows, train)

    y = self._serve(lambda rows: copied(call, module, rows), x, routing)
    give_role(self)
    return y, None


@dataclasses.dataclass(frozen=True)
class ModuleExpert(ExpertOptions):
  """Each expert is a copy of a linen module, called as module(rows [R, M]).

  It is for Python alone: a config names a class that extends `ExpertOptions`.

  Attributes:
    expert: The module that is copied.
  """

  expert: nn.Module

  def module(self, shared: Shared, name: str) -> nn.Module:
    """A copy of the module; what it shares with the model is its own affair."""
    del shared
    return self.expert.copy(name=name)

  def call(self, module, rows, train):
    """The module decides by itself whether it drops."""
    del train
    return module(rows)


@dataclasses.dataclass(frozen=True)
class MixtureExpert(ExpertOptions):
  """Each expert is a mixture of experts itself: a copy of an `MoE`.

  The routers of the inner layers see the rows that tokens are in: a group_size
  of 0 is an expert's rows. Their losses are added to those of the outer layer,
  so that a token pays for each of the inner layers that it meets. Statistics
  are the outer layer's alone. On a mesh the compiler places what moves.

  Attributes:
    expert: The `MoE` that is copied.
  """

  expert: nn.Module

  def experts(self, dispatch: Dispatch, shared: Shared) -> Experts:
    """See `ExpertOptions.experts`."""
    return MixtureSlots(dispatch, shared, self.expert, name=SCOPE)


class MixtureSlots(SlotExperts):
  """E copies of a mixture, each on the rows of its slots.

  Attributes:
    expert: One of them.
  """

  expert: nn.Module

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'G S M'],
    routing: Routing | SlotRouting,
    train: bool = False,
  ) -> tuple[Float[Array, 'G S M'], MoeAux | None]:
    """See `Experts`."""
    rows = self.dispatch.dispatch(x, routing)  # [E, R, M]
    ones = jnp.ones_like(x[..., :1])
    filled = self.dispatch.dispatch(ones, routing)[..., 0] > 0

    def call(moe, rows, filled):
      y, aux = moe(rows[None], filled[None], train)
      return y[0], aux

    rows, aux = copied(call, self.expert, rows, filled)
    return self.dispatch.combine(rows, routing), aux


def copied(
  call: Callable[..., Leaf],
  expert: nn.Module,
  *arguments: Shaped[Array, 'E ...'],
) -> Leaf:
  """call(copy e, *arguments[e]) of each expert e, stacked."""
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


def give_role(experts: nn.Module) -> None:
  """Boxes the parameters of a user's module, which has none for them."""
  if not experts.is_initializing():
    return
  for name, own in experts.variables['params'].items():
    own = parameters.with_role(own, ROLE, stacked=('expert',))
    experts.put_variable('params', name, own)
