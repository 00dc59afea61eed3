"""The exchange of rows sorted by expert: a device gets the rows of its experts.

This is dropless expert parallelism, as in MegaBlocks
(https://arxiv.org/abs/2211.15841) over devices. All functions are called under
`shard_map`. Where the platform has `ragged_all_to_all` (TPU, GPU), only rows
that are needed travel; elsewhere each device gathers all rows and takes its
own. A buffer has room for all rows of all devices, which may all go to one
device, or for a share of them, `capacity_fraction`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Kinds, Options, option
from moe_jax.parallel.layout import Layout, own_blocks
from moe_jax.parallel.shadowing import Shadowing
from moe_jax.routing.capacity import PerToken
from moe_jax.routing.dispatch import take_tokens
from moe_jax.routing.rows import decided
from moe_jax.shapes import Array, Float, Int32

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RaggedExchange(Options):
  """The exchange of rows sorted by expert, in which all rows travel at once.

  Attributes:
    gathers: Whether tokens are gathered on all devices in place of rows that
      travel.
  """

  gathers: ClassVar[bool] = False

  capacity_fraction: float = option(
    1.0,
    'Room of the buffers, as a share of what they need if all rows go to one '
    'device; rows without room are dropped, and counted as exchange_overflow. '
    '1.0 has room for all.',
    above=0,
    maximum=1,
  )

  def leak(self, shadowing: Shadowing) -> str | None:
    """The reason why later tokens change earlier outputs; None if they do not.

    They do where the buffers of the exchange are too small for all rows: the
    rows of a device's last experts drop first, whichever tokens they are of.
    """
    del shadowing
    fraction = self.capacity_fraction
    if fraction == 1.0:
      return None
    return (
      f"the dispatch's exchange.capacity_fraction={fraction} drops the rows of "
      'the last experts of a device first, so that later tokens change earlier '
      'outputs; use capacity_fraction=1.0'
    )

  def exchange_rows(
    self,
    layout: Layout,
    rows: Float[Array, 'N M'],
    sizes: Int32[Array, ' E'],
    experts: Callable[[Array, Array], Array],
  ) -> tuple[Float[Array, 'N M'], Int32[Array, '']]:
    """Applies experts to one device's rows, on the experts' devices.

    Args:
      layout: The layout of groups and experts.
      rows: The rows of this device, sorted by expert.
      sizes: The number of rows of each expert.
      experts: The function (rows sorted by expert, the number of rows of each
        expert of this device [J]) -> outputs, which is called once.

    Returns:
      The outputs, and the number of rows without room. Outputs are zero for
      such rows, and for rows whose expert is on another device along a mesh
      axis that splits experts and not groups.
    """
    axes, N = layout.exchanged, len(rows)
    bound = self.bound(N * layout.devices(axes))

    def travel(rows, to_experts):
      if plan.traffic is None:  # rows stay
        return rows
      lengths = N, len(plan.source)
      return move(rows, plan.traffic, to_experts, lengths, axes)

    with jax.named_scope('exchange'):
      plan = plan_of(layout, N, sizes, bound)
      rows = travel(rows, True)
      rows = take_tokens(rows, plan.source, plan.target[:, None], len(rows))
    outputs = experts(rows, plan.local_sizes)
    with jax.named_scope('exchange'):
      outputs = take_tokens(
        outputs, plan.target, plan.source[:, None], len(outputs)
      )
      return travel(outputs, False), plan.overflow

  def bound(self, num_rows: int) -> int:
    """The number of rows that a device's buffer of received rows has room for.

    Args:
      num_rows: The number of rows if all rows go to one device.
    """
    return PerToken(self.capacity_fraction).per_expert(num_rows, 1, 1)


@dataclasses.dataclass(frozen=True)
class RaggedAllGather(RaggedExchange):
  """An exchange in which tokens are gathered, and no rows travel.

  `gather_exchange.py` does what these options say.
  """

  gathers: ClassVar[bool] = True

  def problems(self) -> Iterator[str]:
    yield from self.in_vain('as all tokens travel', 'capacity_fraction')


RAGGED_EXCHANGES = Kinds(
  'exchange',
  RaggedExchange,
  {'all_to_all': RaggedExchange, 'all_gather': RaggedAllGather},
  inline=True,
)


class Plan(NamedTuple):
  """A plan for how the rows of one device travel to their experts and back.

  J is the number of experts of a device, and R the number of rows for which it
  has room.

  Attributes:
    traffic: The numbers of rows that go between devices; None where rows stay.
    local_sizes: int32 [J], the number of rows of each expert of this device.
    source: int32 [R], for each row in order of expert, the index that it has
      among the received rows; R for a row of zeros, which are last.
    target: int32 [R], for each received row, its index in order of expert.
    overflow: int32 [], the number of this device's rows that found no room on
      the devices of their experts.
  """

  traffic: 'Traffic | None'
  local_sizes: Array
  source: Array
  target: Array
  overflow: Array


def plan_of(
  layout: Layout, num_rows: int, sizes: Int32[Array, ' E'], bound: int
) -> Plan:
  """The plan of the exchange of rows sorted by expert.

  Where experts are split over axes that do not split groups, each device takes
  the rows of its own part of the experts.

  Args:
    layout: The layout of groups and experts.
    num_rows: N, the number of rows of a device.
    sizes: The number of this device's rows for each expert; the function is
      called on each device, under `shard_map`.
    bound: R, the number of rows for which a device has room; more rows are
      dropped, those from the last devices first, and of a device those for the
      last experts first.
  """
  starts = jnp.cumsum(sizes) - sizes
  sizes = own_blocks(layout, sizes)  # [X, J]
  starts = own_blocks(layout, starts)  # [X, J]
  axes, flows = layout.exchanged, None
  R = num_rows * layout.devices(axes)
  overflow = jnp.int32(0)
  if axes:
    flows = traffic(sizes.sum(1), starts[:, 0], axes)
    sizes = jax.lax.all_to_all(sizes, axes, 0, 0)  # [from X, J]
    if bound < R:
      R, unbounded_sizes = bound, flows.sizes
      sizes = jnp.diff(
        jnp.minimum(jnp.cumsum(sizes.reshape(-1)), R), prepend=0
      ).reshape(sizes.shape)
      ends = jnp.minimum(jnp.cumsum(unbounded_sizes, axis=0), R)
      flows = flows._replace(sizes=jnp.diff(ends, axis=0, prepend=0))
      overflow = (unbounded_sizes - flows.sizes)[jax.lax.axis_index(axes)].sum()
    flat = sizes.reshape(-1)
    starts = (jnp.cumsum(flat) - flat).reshape(sizes.shape)
  # Received rows are in order of device, then expert; sorted rows are in order
  # of expert, then device.
  blocks, starts = sizes.T.reshape(-1), starts.T.reshape(-1)
  block = jnp.repeat(jnp.arange(blocks.size), blocks, total_repeat_length=R)
  row = jnp.arange(R, dtype=jnp.int32)
  begins = jnp.cumsum(blocks) - blocks
  source = starts[block] + row - begins[block]
  source = decided(jnp.where(row < blocks.sum(), source, R))
  target = jnp.full(R, R, jnp.int32).at[source].set(row, mode='drop')
  return Plan(flows, sizes.sum(0), source, decided(target), overflow)


class Traffic(NamedTuple):
  """The numbers of rows from each of P devices to each, known to all devices.

  Attributes:
    sizes: int32 [P, P], the number of rows from device i to device j.
    starts: int32 [P, P], the row of device i at which the rows for j begin.
  """

  sizes: Array
  starts: Array


def traffic(
  sizes: Int32[Array, ' P'], starts: Int32[Array, ' P'], axes: Axes
) -> Traffic:
  """Gathers the numbers of rows that each device sends to each other one.

  Args:
    sizes: The number of rows that this device sends to each device.
    starts: The index of the first row that this device sends to each device.
    axes: The mesh axes that the devices are on.
  """
  gathered = jax.lax.all_gather((sizes, starts), axes)
  return Traffic(*(x.reshape(sizes.size, sizes.size) for x in gathered))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def move(
  rows: Float[Array, 'N M'],
  flows: Traffic,
  to_experts: bool,
  lengths: tuple[int, int],
  axes: Axes,
) -> Float[Array, 'R M']:
  """The rows that all devices send to this device, in the devices' order.

  Where `to_experts` is False, received rows return to the devices from which
  they came, so that either way is the other's gradient; unsent rows are zero.

  Args:
    rows: The rows of this device or, on the way back, the rows that it has
      received, in the order in which they came.
    flows: The numbers of rows between devices, and where they begin.
    to_experts: Whether rows go to their experts.
    lengths: The number of rows of each device before the exchange, and R, its
      number of received rows, at least as many as arrive; others are zero.
    axes: The mesh axes that the devices are on.
  """
  me = jax.lax.axis_index(axes)
  out = jnp.zeros((lengths[to_experts], rows.shape[-1]), rows.dtype)
  arrivals = jnp.cumsum(flows.sizes, axis=0) - flows.sizes
  if to_experts:
    received = flows.sizes[:, me]
    blocks = flows.starts[me], flows.sizes[me], arrivals[me], received
  else:
    sent = flows.sizes[:, me]
    blocks = arrivals[:, me], sent, flows.starts[:, me], flows.sizes[me]
  exchange = functools.partial(jax.lax.ragged_all_to_all, axis_name=axes)
  return jax.lax.platform_dependent(
    rows,
    out,
    *blocks,
    tpu=exchange,
    cuda=exchange,
    default=functools.partial(all_gather_reference, axis_name=axes),
  )


def _forward(rows, flows, to_experts, lengths, axes):
  return move(rows, flows, to_experts, lengths, axes), flows


def _backward(to_experts, lengths, axes, flows, d_rows):
  return move(d_rows, flows, not to_experts, lengths, axes), None


move.defvjp(_forward, _backward)


def all_gather_reference(
  operand: Float[Array, 'N M'],
  output: Float[Array, 'R M'],
  input_offsets: Int32[Array, ' P'],
  send_sizes: Int32[Array, ' P'],
  output_offsets: Int32[Array, ' P'],
  recv_sizes: Int32[Array, ' P'],
  *,
  axis_name: Axes,
) -> Float[Array, 'R M']:
  """The result of `jax.lax.ragged_all_to_all`, by a gather of all rows.

  The arguments are those of that function, for P devices along the mesh axes
  `axis_name`; `recv_sizes` is not read.
  """
  del recv_sizes  # the same numbers are in the senders' sizes
  P, N = send_sizes.size, len(operand)
  all_rows = jax.lax.all_gather(operand, axis_name).reshape(P * N, -1)
  me = jax.lax.axis_index(axis_name)
  blocks = (input_offsets, send_sizes, output_offsets)
  starts, sizes, offsets = (
    jax.lax.all_gather(x, axis_name).reshape(P, P)[:, me] for x in blocks
  )
  column = jnp.arange(len(output), dtype=jnp.int32)[None] - offsets[:, None]
  inside = (column >= 0) & (column < sizes[:, None])  # [P, R]
  source = jnp.argmax(inside, axis=0)
  row = jnp.take_along_axis(column, source[None], axis=0)[0]
  row = row + starts[source] + source * N
  gathered_rows = jnp.take(all_rows, row, axis=0, mode='clip')
  return jnp.where(inside.any(0)[:, None], gathered_rows, output)
