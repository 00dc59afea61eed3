"""Exchanges of rows sorted by expert: each device gets those of its experts."""

import dataclasses
from collections.abc import Callable

import jax

from moe_jax.options import Kinds, Options, at_least, one_of, option, within
from moe_jax.parallel.exchange import DTYPE_SENTENCE, DTYPES
from moe_jax.parallel.layout import Layout
from moe_jax.parallel.ragged import plan
from moe_jax.parallel.schedule import Ring, serve_sorted
from moe_jax.routing.capacity import PerToken
from moe_jax.shapes import Array, Float, Int32


@dataclasses.dataclass(frozen=True)
class RaggedExchange(Options):
  """The contract of exchanges of sorted rows."""

  dtype: str = option('', DTYPE_SENTENCE, one_of(*DTYPES))
  capacity_fraction: float = option(
    1.0,
    'Room of the buffers, as a share of what they need if all rows go to one '
    'device; rows without room are dropped, and counted as exchange_overflow. '
    '1.0 has room for all.',
    within('(0, 1]'),
  )

  def serve(
    self,
    layout: Layout,
    rows: Float[Array, 'N M'],
    sizes: Int32[Array, ' E'],
    experts: Callable[[Array, Array], Array],
  ) -> tuple[Float[Array, 'N M'], Int32[Array, '']]:
    """Serves one device's rows on their experts' devices, under `shard_map`.

    Args:
      layout: The layout of groups and experts.
      rows: The rows of this device, sorted by expert.
      sizes: The number of rows of each expert.
      experts: The function (rows sorted by expert, the number of rows of each
        expert of this device [J]) -> outputs.

    Returns:
      The outputs, zero for rows that other devices serve or that found no room,
      and the number of the latter.
    """
    raise NotImplementedError

  def bound(self, num_rows: int) -> int:
    """The room that a buffer has, where all would need `num_rows`."""
    return PerToken(self.capacity_fraction).per_expert(num_rows, 1, 1)


@dataclasses.dataclass(frozen=True)
class RaggedAllToAll(RaggedExchange):
  """All rows at once, by `ragged_all_to_all` where the platform has it."""

  def serve(self, layout, rows, sizes, experts):
    """See `RaggedExchange.serve`."""
    X = layout.devices(layout.exchanged)
    with jax.named_scope('exchange'):
      trip = plan(layout, len(rows), sizes, self.bound(X * len(rows)))
      packed = rows.astype(self.dtype or rows.dtype)
      expert_rows = trip.to_experts(packed).astype(rows.dtype)
    outputs = experts(expert_rows, trip.local_sizes)
    with jax.named_scope('exchange'):
      group_rows = trip.to_groups(outputs.astype(packed.dtype))
    return group_rows.astype(rows.dtype), trip.overflow


@dataclasses.dataclass(frozen=True)
class RaggedRing(RaggedExchange):
  """The smart schedule: rows travel along a ring, one group of devices a step.

  Source: FasterMoE; see `schedule.py`. The experts multiply the rows of one
  device at a time. A device sends to each other one a buffer with room for all
  of its rows, or for the fraction of them.
  """

  ring_group: int = option(
    1,
    'Number of devices that are one place on the ring; a step of the schedule '
    'has as many permutations.',
    at_least(1),
  )

  def serve(self, layout, rows, sizes, experts):
    """See `RaggedExchange.serve`."""
    if not layout.exchanged:
      at_once = RaggedAllToAll(self.dtype, self.capacity_fraction)
      return at_once.serve(layout, rows, sizes, experts)
    ring = Ring(layout, self.ring_group)
    bound = self.bound(len(rows))
    return serve_sorted(ring, rows, sizes, experts, bound, self.dtype)


RAGGED_EXCHANGES = Kinds(
  'exchange',
  RaggedExchange,
  {'all_to_all': RaggedAllToAll, 'ring': RaggedRing},
  inline=True,
)
