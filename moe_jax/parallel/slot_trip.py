"""Moves tokens to experts with slots over a mesh, and sums their outputs.

Each device moves its groups' tokens to rows, rows travel as an exchange says,
experts multiply those that they have, and each device sums their outputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from moe_jax.errors import InputError
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.exchange import Exchange
from moe_jax.parallel.layout import Layout, own_blocks
from moe_jax.parallel.shadowing import (
  Shadowing,
  SplitRouting,
  gathered,
  moved_rows,
  split,
)
from moe_jax.routing import AnyRouting, ExchangeStats, Routing, one_queue
from moe_jax.routing.dispatch import Dispatcher
from moe_jax.shapes import Array, Float


class StackedExperts(NamedTuple):
  """Experts whose parameters are arrays that have the experts first.

  Attributes:
    compute: The function (parameters [*E, ...], rows [*E, R, M]) -> rows.
    p: The parameters, [E, ...].
    axes: The logical axes of each parameter.
    sizes: The sizes of an expert.
  """

  compute: Callable[[Any, Array], Array]
  p: dict[str, Array]
  axes: Mapping[str, tuple[str | None, ...]]
  sizes: Sizes

  def __call__(self, rows: Float[Array, 'E R M']) -> Float[Array, 'E R M']:
    """The outputs of all experts."""
    return self.compute(self.p, rows)


@dataclasses.dataclass(frozen=True)
class SlotTrip:
  """A trip of rows in slots.

  Attributes:
    layout: The layout of groups and experts on the mesh.
    dispatcher: The dispatcher between tokens and rows.
    exchange: The exchange by which rows travel.
    shadowing: The experts that are sent to all devices; it needs
      `StackedExperts`.
  """

  layout: Layout
  dispatcher: Dispatcher
  exchange: Exchange
  shadowing: Shadowing = Shadowing()

  def serve(
    self,
    experts: Callable[[Array], Array] | StackedExperts,
    x: Float[Array, 'G S M'],
    routing: AnyRouting,
  ) -> tuple[Float[Array, 'G S M'], ExchangeStats]:
    """Serves tokens by experts on a mesh.

    Args:
      experts: The experts: a function from rows [E, R, M] to rows, or
        `StackedExperts`.
      x: The groups of tokens.
      routing: The routing of all groups.

    Raises:
      ValueError: The layout, the experts or the routing do not allow what the
        options ask for.
    """
    layout, exchange = self.layout, self.exchange
    sizes = experts.sizes if isinstance(experts, StackedExperts) else None
    if self.shadowing.experts and sizes is None:
      raise InputError(
        f'shadowing.experts={self.shadowing.experts} needs feed-forward '
        'experts, whose parameters are arrays; these are modules'
      )
    groups_spec = layout.spec(layout.groups)
    pieces_spec = exchange.pieces_spec(layout)
    copies_spec = layout.spec(layout.group_only)
    staying_spec = layout.spec(layout.group_only, (), layout.exchanged)
    with jax.named_scope('dispatch'):
      pieces, staying_rows, shadowed, choices, stats = self._mapped(
        functools.partial(self._depart, sizes),
        (groups_spec, groups_spec),
        (pieces_spec, staying_spec, copies_spec, groups_spec, groups_spec),
      )(x, routing)
    with jax.named_scope('exchange'):
      inputs = [exchange.to_experts(layout, p, i) for i, p in enumerate(pieces)]
    outputs = [experts(rows) for rows in inputs]
    if staying_rows is not None:
      staying_rows = self._in_shadow(experts, staying_rows, shadowed)
    with jax.named_scope('exchange'):
      pieces = [
        exchange.to_groups(layout, rows, i) for i, rows in enumerate(outputs)
      ]
    with jax.named_scope('combine'):
      y = self._mapped(
        functools.partial(self._arrive, x.shape),
        (pieces_spec, staying_spec, groups_spec),
        groups_spec,
      )(pieces, staying_rows, choices)
    return y, jax.tree.map(lambda leaf: leaf.sum(), stats)

  def _mapped(self, function, in_specs, out_specs):
    return jax.shard_map(
      function,
      mesh=self.layout.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )

  def _depart(self, sizes, x, routing):
    """Splits one device's choices, fills rows of both kinds, counts moves."""
    counts = routing.rows_per_expert()
    shadowed = self.shadowing.choose(self.layout, counts, sizes)
    choices = split(routing, shadowed)
    sent_counts = choices.sent.rows_per_expert()
    sent = self._fitted(choices.sent)
    overflow = own_blocks(self.layout, sent_counts - sent.rows_per_expert())
    stats = moved_rows(
      self.layout, counts, sent_counts, shadowed, overflow.sum()
    )
    rows = self._dispatched(x, sent)
    staying = (
      None
      if choices.staying is None
      else self._dispatched(x, choices.staying)[None]
    )
    return (
      self.exchange.cut(self.layout, rows),
      staying,
      shadowed[None],
      SplitRouting(sent, choices.staying),
      jax.tree.map(lambda leaf: leaf[None], stats),
    )

  def _arrive(self, shape, pieces, staying, choices):
    """The sums of one device's tokens."""
    shape = (-1, *shape[1:])
    rows = self.exchange.joined(self.layout, pieces)
    y = self.dispatcher.combine(rows, choices.sent).reshape(shape)
    if staying is not None:
      y = y + self.dispatcher.combine(staying[0], choices.staying).reshape(
        shape
      )
    return y

  def _dispatched(self, x, routing):
    x = x.reshape(-1, routing.group_size, x.shape[-1])
    return self.dispatcher.dispatch(x, routing)

  def _fitted(self, sent):
    """The choices for which the exchange has room."""
    if self.exchange.capacity_fraction == 1.0 or not self.layout.exchanged:
      return sent
    if not (isinstance(sent, Routing) and sent.token_index is None):
      raise InputError(
        f'exchange.capacity_fraction={self.exchange.capacity_fraction} would '
        'always drop tokens where experts choose, as these fill all their '
        'slots; use 1.0'
      )
    slots = len(sent.gate) * sent.bounded()
    return one_queue(sent, self.exchange.capacity(slots))

  def _in_shadow(self, experts, rows, shadowed):
    """The outputs of shadowed experts for the rows that stay, [D, R, N, M].

    The first dimension is split over the axes that hold copies of the experts.
    """
    layout = self.layout
    split_over = {'expert': layout.experts, 'expert_mlp': layout.hidden}

    def spec(name, first):
      _, *axes = experts.axes[name]
      return layout.spec(*first, *(split_over.get(a, ()) for a in axes))

    def local(p, shadowed):
      return {
        name: x[None] for name, x in gathered(layout, p, shadowed[0]).items()
      }

    p = self._mapped(
      local,
      (
        {name: spec(name, [layout.experts]) for name in experts.p},
        layout.spec(layout.group_only),
      ),
      {name: spec(name, [layout.group_only, ()]) for name in experts.p},
    )(experts.p, shadowed)
    D, R, N, M = rows.shape
    p = {name: x.reshape(D * R, *x.shape[2:]) for name, x in p.items()}
    return experts.compute(p, rows.reshape(D * R, N, M)).reshape(rows.shape)
