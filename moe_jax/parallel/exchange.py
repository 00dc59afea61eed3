"""The exchange of expert parallelism: rows to their experts' devices and back.

GShard, https://arxiv.org/abs/2006.16668, section 3.2. Groups are split over
some mesh axes and experts over others; a row is filled on the device of its
group, and multiplied on that of its expert. Rows are `[E, R, M]`, R for each
expert.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.options import (
  Kinds,
  Options,
  at_least,
  one_of,
  option,
  required,
  within,
)
from moe_jax.parallel.layout import Layout, own_blocks
from moe_jax.parallel.schedule import Ring
from moe_jax.routing.capacity import PerToken
from moe_jax.shapes import Array, Float

DTYPES = ('', 'bfloat16', 'float32')
DTYPE_SENTENCE = (
  "Type of expert rows while they travel between devices; '' keeps the type of "
  'the products.'
)


@dataclasses.dataclass(frozen=True)
class Exchange(Options):
  """The contract of exchanges of rows in slots.

  Rows travel in pieces. All exchanges are equal in value and gradient, except
  for experts' dropout, which is drawn by row: rows may come in another order.
  """

  dtype: str = option('', DTYPE_SENTENCE, one_of(*DTYPES))
  capacity_fraction: float = option(
    1.0,
    'Share of the slots that an expert has on a device, of all groups there, '
    'for which the exchange has room; choices beyond it are dropped, and '
    'counted as exchange_overflow. 1.0 has room for all.',
    within('(0, 1]'),
  )

  def capacity(self, slots: int) -> int:
    """The slots of an expert that travel from a device that has `slots`."""
    return PerToken(self.capacity_fraction).per_expert(slots, 1, 1)

  def cut(
    self, layout: Layout, rows: Float[Array, 'E R M']
  ) -> list[Float[Array, '_ _ M']]:
    """The pieces of one device's rows, in the order in which they travel.

    It is called under `shard_map`; a piece has rows along its dimension 1.
    """
    del layout
    return [rows]

  def joined(
    self, layout: Layout, pieces: Sequence[Float[Array, '_ _ M']]
  ) -> Float[Array, 'E R M']:
    """Undoes `cut`, under `shard_map`."""
    del layout
    return jnp.concatenate(pieces, axis=1)

  def pieces_spec(self, layout: Layout) -> PartitionSpec:
    """The spec of pieces, of which `cut` makes each device's part."""
    return layout.spec((), layout.groups)

  def to_experts(
    self, layout: Layout, piece: Float[Array, '_ _ M'], number: int = 0
  ) -> Float[Array, 'E _ M']:
    """Moves a piece split over groups to rows split over experts.

    An expert's rows may come in another order, which `to_groups` undoes.

    Args:
      layout: The layout of groups and experts.
      piece: The piece, of whose dimension 1 each device has a part.
      number: The number of the piece in the list that `cut` returned.
    """
    packed = piece.astype(self.dtype or piece.dtype)
    return self.move_to_experts(layout, packed, number).astype(piece.dtype)

  def to_groups(
    self, layout: Layout, rows: Float[Array, 'E _ M'], number: int = 0
  ) -> Float[Array, '_ _ M']:
    """Undoes `to_experts`: moves rows split over experts back to groups."""
    packed = rows.astype(self.dtype or rows.dtype)
    return self.move_to_groups(layout, packed, number).astype(rows.dtype)

  @required
  def move_to_experts(
    self, layout: Layout, piece: Float[Array, '_ _ M'], number: int
  ) -> Float[Array, 'E _ M']:
    """`to_experts` in the type in which rows travel."""
    raise NotImplementedError

  @required
  def move_to_groups(
    self, layout: Layout, rows: Float[Array, 'E _ M'], number: int
  ) -> Float[Array, '_ _ M']:
    """`to_groups` in the type in which rows travel."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class InChunks(Exchange):
  """Exchanges of all devices' rows at once, or a part of each expert's."""

  chunks: int = option(
    1,
    'Number of pieces in which expert rows travel between devices, so that one '
    'may travel while experts multiply another; 1 sends all rows at once.',
    at_least(1),
  )

  def cut(self, layout, rows):
    """Equal pieces of each expert's rows; one piece if no rows travel."""
    pieces = min(self.chunks if layout.exchanged else 1, rows.shape[1])
    return jnp.array_split(rows, pieces, axis=1)


@dataclasses.dataclass(frozen=True)
class Constraint(InChunks):
  """An exchange by shardings, from which the compiler makes an all-to-all.

  Source: GShard.
  """

  def move_to_experts(self, layout, piece, number):
    """See `Exchange.move_to_experts`."""
    return _constrained(layout, piece, to_experts=True)

  def move_to_groups(self, layout, rows, number):
    """See `Exchange.move_to_groups`."""
    return _constrained(layout, rows, to_experts=False)


@dataclasses.dataclass(frozen=True)
class AllToAll(InChunks):
  """An exchange by an all-to-all that is written out under `shard_map`."""

  def move_to_experts(self, layout, piece, number):
    """See `Exchange.move_to_experts`."""
    return jax.shard_map(
      functools.partial(_send, layout),
      mesh=layout.mesh,
      in_specs=layout.spec((), layout.groups),
      out_specs=layout.spec(layout.experts, layout.group_only),
      check_vma=False,
    )(piece)

  def move_to_groups(self, layout, rows, number):
    """See `Exchange.move_to_groups`."""
    return jax.shard_map(
      functools.partial(_send_back, layout),
      mesh=layout.mesh,
      in_specs=layout.spec(layout.experts, layout.group_only),
      out_specs=layout.spec((), layout.groups),
      check_vma=False,
    )(rows)


@dataclasses.dataclass(frozen=True)
class InRing(Exchange):
  """The smart schedule: rows travel along a ring, one group of devices a step.

  Source: FasterMoE; see `schedule.py`.
  """

  ring_group: int = option(
    1,
    'Number of devices that are one place on the ring; a step of the schedule '
    'has as many permutations, and experts multiply its rows together.',
    at_least(1),
  )

  def cut(self, layout, rows):
    """A piece for each step: the rows for the experts of a place on the ring.

    Those of the device's own place come first.
    """
    if not layout.exchanged:
      return [rows]
    blocks = own_blocks(layout, rows)  # [X, J, R, M]
    ring = self._ring(layout)
    return [
      jnp.concatenate([blocks[hop.target] for hop in ring.hops(step)], axis=1)
      for step in range(ring.num_steps)
    ]

  def joined(self, layout, pieces):
    """Undoes `cut`."""
    if not layout.exchanged:
      return pieces[0]
    ring = self._ring(layout)
    hops = [hop for step in range(ring.num_steps) for hop in ring.hops(step)]
    targets = jnp.stack([hop.target for hop in hops])
    rows = jnp.stack(  # [X, J, R, M], in the order of the hops
      [part for piece in pieces for part in ring.split(piece)]
    )
    return _all_blocks(layout, jnp.zeros_like(rows).at[targets].set(rows))

  def pieces_spec(self, layout):
    """See `Exchange.pieces_spec`; `cut` takes a device's part of experts."""
    expert_axes = layout.expert_only if layout.exchanged else ()
    return layout.spec(expert_axes, layout.groups)

  def _ring(self, layout):
    return Ring(layout, self.ring_group)

  def move_to_experts(self, layout, piece, number):
    """See `Exchange.move_to_experts`."""
    return self._moved(layout, piece, number, back=False)

  def move_to_groups(self, layout, rows, number):
    """See `Exchange.move_to_groups`."""
    return self._moved(layout, rows, number, back=True)

  def _moved(self, layout, piece, number, back):
    at_groups = self.pieces_spec(layout)
    at_experts = layout.spec(layout.experts, layout.group_only)
    source, target = at_groups, at_experts
    if back:
      source, target = target, source
    if layout.exchanged:
      move = functools.partial(self._ring(layout).moved, step=number, back=back)
    else:  # each device takes its own experts
      move = functools.partial(_send_back if back else _send, layout)
    return jax.shard_map(
      move,
      mesh=layout.mesh,
      in_specs=source,
      out_specs=target,
      check_vma=False,
    )(piece)


EXCHANGES = Kinds(
  'exchange',
  Exchange,
  {'constraint': Constraint, 'all_to_all': AllToAll, 'ring': InRing},
  inline=True,
)


def _constrained(layout, rows, to_experts):
  """The same rows with their sharding stated before and after.

  R is split into a dimension for each axis of the groups. So the compiler sees
  that some of them move from R to E; otherwise it gathers everything.
  """
  E, R, M = rows.shape
  devices = [layout.sizes[name] for name in layout.groups]
  split_rows = rows.reshape(E, *devices, R // math.prod(devices), M)

  def constrained(x, experts, groups):
    spec = [names or None for names in (experts, *groups)]
    spec = PartitionSpec(*spec, None, None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))

  at_groups = (), [(name,) for name in layout.groups]
  at_experts = (
    layout.experts,
    [(name,) if name in layout.group_only else () for name in layout.groups],
  )
  before, after = (
    (at_groups, at_experts) if to_experts else (at_experts, at_groups)
  )
  split_rows = constrained(constrained(split_rows, *before), *after)
  return split_rows.reshape(E, R, M)


def _send(layout, rows):
  """One device's rows of all experts -> all devices' rows of its experts."""
  rows = own_blocks(layout, rows)  # [X, J, R, M]
  X, J, R, M = rows.shape
  if layout.exchanged:
    rows = jax.lax.all_to_all(rows, layout.exchanged, 0, 0)
  return rows.swapaxes(0, 1).reshape(J, X * R, M)


def _send_back(layout, rows):
  J, XR, M = rows.shape
  X = layout.devices(layout.exchanged)
  rows = rows.reshape(J, X, XR // X, M).swapaxes(0, 1)  # [X, J, R, M]
  if layout.exchanged:
    rows = jax.lax.all_to_all(rows, layout.exchanged, 0, 0)
  return _all_blocks(layout, rows)


def _all_blocks(layout, rows):
  """Undoes `own_blocks`: gathers the other parts from their devices."""
  sizes = [layout.sizes[name] for name in layout.exchanged]
  rows = rows.reshape(*sizes, *rows.shape[1:])
  for i, name in enumerate(layout.experts):
    if name not in layout.exchanged:
      rows = jax.lax.all_gather(rows, name, axis=i)
  return rows.reshape(-1, *rows.shape[-2:])
