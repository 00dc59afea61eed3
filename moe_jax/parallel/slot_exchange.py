"""Applies experts with slots on a mesh: rows travel to experts and back.

Each device copies its groups' tokens to rows, an `Exchange` moves rows to the
devices of their experts, experts multiply these rows, the exchange moves the
outputs back, and each device sums the outputs of each token.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from moe_jax.errors import InputError
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.exchange import Constraint, Exchange
from moe_jax.parallel.layout import Layout, own_blocks
from moe_jax.parallel.shadowing import Shadowing, gathered, moved_rows, split
from moe_jax.routing import AnyRouting, ExchangeStats, Routing, one_queue
from moe_jax.routing.dispatch import Dispatcher
from moe_jax.shapes import Array, Float, Int32


class StackedExperts(NamedTuple):
  """Experts that all multiply equally many rows.

  Attributes:
    compute: The function (params [*E, ...], rows [*E, R, M]) -> rows. It may
      call a Flax module, which holds its own parameters.
    params: The parameters, [E, ...], by name; {} if a module holds them.
    axes: The logical axes of each parameter, by name.
    sizes: The widths, and the bytes and FLOPs that follow from them, by which
      shadowing chooses experts; None if `compute` calls a module.
  """

  compute: Callable[[Any, Array], Array]
  params: Mapping[str, Array]
  axes: Mapping[str, tuple[str | None, ...]]
  sizes: Sizes | None

  def __call__(self, rows: Float[Array, 'E R M']) -> Float[Array, 'E R M']:
    return self.compute(self.params, rows)


def exchange_slots(
  experts: StackedExperts,
  x: Float[Array, 'G S M'],
  routing: AnyRouting,
  *,
  layout: Layout,
  dispatcher: Dispatcher,
  exchange: Exchange,
  shadowing: Shadowing = Shadowing(),
) -> tuple[Float[Array, 'G S M'], ExchangeStats]:
  """The gated sums of experts' outputs on a mesh, and counts of moved rows.

  Args:
    experts: The experts.
    x: The groups of tokens.
    routing: The routing of all groups.
    layout: The layout of groups and experts on the mesh.
    dispatcher: The dispatcher between tokens and rows.
    exchange: The exchange by which rows travel.
    shadowing: The options of which experts are sent to all devices.

  Raises:
    ValueError: Experts that shadowing may choose are modules, or are split over
      axes that groups are not; or an exchange drops rows where experts choose.
  """
  if shadowing.experts and experts.sizes is None:
    raise InputError(
      f'shadowing.experts={shadowing.experts} needs feed-forward experts, '
      'whose parameters are arrays; these are modules'
    )
  if not layout.exchanged:  # no rows travel, and all find room
    exchange = Constraint()
  groups_spec = layout.spec(layout.groups)
  pieces_spec = exchange.pieces_spec(layout)
  staying_spec = layout.spec(layout.group_only, (), layout.exchanged)

  def rows_of(x, routing):
    # `_with_room` may have made a single group of all groups of a device.
    x = x.reshape(-1, routing.group_size, x.shape[-1])
    return dispatcher.dispatch(x, routing)

  def sums_of(rows, routing):
    return dispatcher.combine(rows, routing).reshape(-1, *x.shape[1:])

  def depart(x, routing):
    """Fills one device's rows, those that travel and those that stay.

    The results are the pieces of the former, in a list; the latter [1, R, _, M]
    of R shadowed experts, or None; these experts [1, R]; the two routings; and
    counts of rows, [1] each. On the mesh, the 1 is a dimension of devices.
    """
    counts = routing.rows_per_expert()
    shadowed = shadowing.choose(layout, counts, experts.sizes)
    sent, staying = split(routing, shadowed)
    sent_counts = sent.rows_per_expert()
    if exchange.capacity_fraction != 1.0:
      sent = _with_room(sent, exchange)
    overflow = own_blocks(layout, sent_counts - sent.rows_per_expert()).sum()
    stats = moved_rows(layout, counts, sent_counts, shadowed, overflow)
    pieces = exchange.cut(layout, rows_of(x, sent))
    staying_rows = None if staying is None else rows_of(x, staying)[None]
    stats = jax.tree.map(lambda leaf: leaf[None], stats)
    return pieces, staying_rows, shadowed[None], (sent, staying), stats

  def arrive(pieces, staying_rows, choices):
    """The gated sum of outputs for each token of one device, [G, S, M].

    Args:
      pieces: The outputs for the rows that travelled, in the pieces, arrays
        [_, _, M], in which they travelled; `exchange` joins them to [E, R, M].
      staying_rows: The outputs of R shadowed experts for the rows that stayed,
        [1, R, _, M]; None if no expert can be shadowed.
      choices: The routings of the rows that travelled and that stayed.
    """
    sent, staying = choices
    y = sums_of(exchange.joined(layout, pieces), sent)
    return y if staying is None else y + sums_of(staying_rows[0], staying)

  with jax.named_scope('dispatch'):
    pieces, staying_rows, shadowed, choices, stats = layout.on_each_device(
      depart,
      (groups_spec, groups_spec),
      (
        pieces_spec,
        staying_spec,
        layout.spec(layout.group_only),
        groups_spec,
        groups_spec,
      ),
    )(x, routing)
  with jax.named_scope('exchange'):
    inputs = [
      exchange.move(layout, rows, to_experts=True, number=i)
      for i, rows in enumerate(pieces)
    ]
  outputs = [experts(rows) for rows in inputs]
  if staying_rows is not None:
    staying_rows = _in_shadow(experts, layout, staying_rows, shadowed)
  with jax.named_scope('exchange'):
    pieces = [
      exchange.move(layout, rows, to_experts=False, number=i)
      for i, rows in enumerate(outputs)
    ]
  with jax.named_scope('combine'):
    y = layout.on_each_device(
      arrive, (pieces_spec, staying_spec, groups_spec), groups_spec
    )(pieces, staying_rows, choices)
  return y, jax.tree.map(lambda leaf: leaf.sum(), stats)


def _with_room(sent: AnyRouting, exchange: Exchange) -> Routing:
  """Makes one group of a device's groups, with the choices that find room.

  The exchange has room for a share of the slots; other choices are dropped.

  Raises:
    ValueError: The experts choose tokens.
  """
  if not (isinstance(sent, Routing) and sent.token_index is None):
    raise InputError(
      f'exchange.capacity_fraction={exchange.capacity_fraction} would always '
      'drop tokens where experts choose, as these fill all their slots; use '
      '1.0'
    )
  slots = len(sent.gate) * sent.bounded()
  return one_queue(sent, exchange.capacity(slots))


def _in_shadow(
  experts: StackedExperts,
  layout: Layout,
  rows: Float[Array, 'D R N M'],
  shadowed: Int32[Array, 'D R'],
) -> Float[Array, 'D R N M']:
  """The outputs of shadowed experts for the rows that stay on their devices.

  Each of R shadowed experts has N rows on a device. The dimension D is split
  over the mesh axes that split groups but not experts. `shadowed` has the
  indices of the experts, or E where a place is unused, whose outputs are those
  of parameters of zero.
  """

  def local(params, shadowed):
    params = gathered(layout, params, shadowed[0])
    return {name: w[None] for name, w in params.items()}

  params = layout.on_each_device(
    local,
    (layout.parameter_specs(experts.axes), layout.spec(layout.group_only)),
    layout.parameter_specs(experts.axes, layout.group_only, ()),
  )(experts.params, shadowed)
  D, R, N, M = rows.shape
  params = {name: w.reshape(D * R, *w.shape[2:]) for name, w in params.items()}
  return experts.compute(params, rows.reshape(D * R, N, M)).reshape(rows.shape)
