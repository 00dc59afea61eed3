"""The smart schedule of FasterMoE: an exchange in steps along a ring.

He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418, section 4.2. The
W devices are g groups on a ring. In step j group i does S_j: it sends rows to
the experts of group i - j and receives from group i + j; C_j: its experts
multiply these rows; and R_j: it returns the results. Step 0 stays within
groups. S_j, C_j, R_j depend on one another, and steps do not, so that a
compiler may send in one step while experts multiply in another. All S_j are
asked for first, then all C_j, then all R_j, as published.

A step is as many permutations as a group has devices, one for each device of
the other group; with groups of one device, one. Rows in slots are multiplied
together for all devices of a group; sorted rows, which would have to be sorted
anew, for each device by itself.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.parallel.layout import Layout, own_blocks
from moe_jax.shapes import Array, Float, Int32, Leaf


class Hop(NamedTuple):
  """One permutation of devices, as one of them sees it.

  Attributes:
    target: int32 [], the device to which this one sends rows.
    source: int32 [], the device whose rows this one receives.
  """

  target: Leaf
  source: Leaf


@dataclasses.dataclass(frozen=True)
class Ring:
  """The order in which devices exchange with each other.

  Attributes:
    layout: The layout, whose `exchanged` axes have the devices.
    group: The number of devices in one place of the ring.

  Raises:
    ValueError: The devices are no whole number of groups.
  """

  layout: Layout
  group: int = 1

  def __post_init__(self):
    if self.num_devices % self.group:
      raise InputError(
        f'ring_group={self.group} does not divide the {self.num_devices} '
        f'devices that rows travel between, along {self.layout.exchanged}'
      )

  @property
  def num_devices(self) -> int:
    """W, the number of devices that rows travel between."""
    return self.layout.devices(self.layout.exchanged)

  def target(self, device: Leaf, number: int) -> Leaf:
    """The device to which `device` sends in permutation `number`."""
    return self._shifted(device, number, -1)

  def source(self, device: Leaf, number: int) -> Leaf:
    """The device from which `device` receives in permutation `number`."""
    return self._shifted(device, number, 1)

  def _shifted(self, device, number, sign):
    s, g = self.group, self.num_steps
    j, b = divmod(number, s)
    ring_place, within = device // s, device % s
    return (ring_place + sign * j) % g * s + (within - sign * b) % s

  @property
  def num_steps(self) -> int:
    """g, the number of steps, and of places on the ring."""
    return self.num_devices // self.group

  def hops(self, step: int) -> list[Hop]:
    """This device's permutations of a step; called under `shard_map`."""
    me = jax.lax.axis_index(self.layout.exchanged)
    numbers = range(step * self.group, (step + 1) * self.group)
    return [Hop(self.target(me, n), self.source(me, n)) for n in numbers]

  def split(self, piece: Float[Array, 'J R M']) -> list[Float[Array, 'J _ M']]:
    """The rows of each permutation of a step."""
    return jnp.split(piece, self.group, axis=1)

  def moved(
    self, piece: Float[Array, 'J R M'], step: int, back: bool = False
  ) -> Float[Array, 'J R M']:
    """The rows that a step brings, or, `back`, those that it returns.

    It is called under `shard_map`.

    Args:
      piece: The rows of each permutation, one after another.
      step: The number of the step.
      back: Whether rows return.
    """
    first = step * self.group
    pieces = [
      self.permuted(part, first + i, back)
      for i, part in enumerate(self.split(piece))
    ]
    return jnp.concatenate(pieces, axis=1)

  def permuted(
    self, rows: Float[Array, '*R M'], number: int, back: bool = False
  ) -> Float[Array, '*R M']:
    """Rows of the source of a permutation, or, `back`, those of its target.

    It is called under `shard_map`. Permutation 0 moves nothing.
    """
    pairs = [(d, self.target(d, number)) for d in range(self.num_devices)]
    if all(source == target for source, target in pairs):
      return rows
    if back:
      pairs = [(target, source) for source, target in pairs]
    axes, numbers = self._in_mesh_order()
    pairs = [(numbers[source], numbers[target]) for source, target in pairs]
    return jax.lax.ppermute(rows, axes, pairs)

  def _in_mesh_order(self) -> tuple[tuple[str, ...], list[int]]:
    """The axes in the mesh's order, and each device's number along them.

    `ppermute` counts devices in that order, however its axes are given; all
    other collectives count in the order of their axes.
    """
    given, order = self.layout.exchanged, self.layout.mesh.axis_names
    axes = tuple(sorted(given, key=order.index))
    devices = np.arange(self.num_devices)
    devices = devices.reshape([self.layout.sizes[name] for name in given])
    devices = devices.transpose([given.index(name) for name in axes])
    return axes, np.argsort(devices, axis=None).tolist()


def serve_sorted(
  ring: Ring,
  rows: Float[Array, 'N M'],
  sizes: Int32[Array, ' E'],
  serve: Callable[[Array, Array], Array],
  bound: int,
  dtype: str = '',
) -> tuple[Float[Array, 'N M'], Int32[Array, '']]:
  """Serves rows sorted by expert, each on the device of its expert.

  It is called under `shard_map`.

  Args:
    ring: The ring.
    rows: The rows of this device; those past the sum of `sizes` belong to none.
    sizes: The number of rows of each expert.
    serve: The function (rows [bound, M] sorted by expert, their numbers [J] for
      each expert of this device) -> outputs.
    bound: The largest number of rows that go from one device to another.
    dtype: The type of rows that travel; '' is their own.

  Returns:
    The outputs of the rows, zero for those that found no room, and the number
    of these.
  """
  blocks = own_blocks(ring.layout, sizes)  # [X, J]
  starts = own_blocks(ring.layout, jnp.cumsum(sizes) - sizes)[:, 0]
  sent = _clipped(blocks, bound)
  received = jax.lax.all_to_all(sent, ring.layout.exchanged, 0, 0)
  hops = [hop for step in range(ring.num_steps) for hop in ring.hops(step)]
  windows = [
    _Window(starts[hop.target], sent[hop.target].sum(), bound) for hop in hops
  ]
  padded = jnp.pad(rows, ((0, bound), (0, 0)))
  travel_dtype = dtype or rows.dtype
  with jax.named_scope('exchange'):
    arrivals = [
      ring.permuted(window.read(padded).astype(travel_dtype), number)
      for number, window in enumerate(windows)
    ]
  outputs = [
    serve(piece.astype(rows.dtype), received[hop.source])
    for piece, hop in zip(arrivals, hops)
  ]
  with jax.named_scope('exchange'):
    returns = [
      ring.permuted(output.astype(travel_dtype), number, back=True)
      for number, output in enumerate(outputs)
    ]
  total = jnp.zeros_like(padded)
  for window, piece in zip(windows, returns):
    total = window.add(total, piece.astype(rows.dtype))
  return total[: len(rows)], (blocks - sent).sum()


class _Window(NamedTuple):
  """Some of a device's sorted rows, in a buffer with room for more.

  Attributes:
    start: int32 [], the first row of the window.
    count: int32 [], the number of rows of the window.
    bound: The number of rows of the buffer.
  """

  start: Array
  count: Array
  bound: int

  def read(self, rows: Float[Array, 'N M']) -> Float[Array, 'R M']:
    """The rows of the window, then zeros."""
    at, shape = (self.start, jnp.int32(0)), (self.bound, rows.shape[1])
    return self._real(jax.lax.dynamic_slice(rows, at, shape))

  def add(
    self, rows: Float[Array, 'N M'], piece: Float[Array, 'R M']
  ) -> Float[Array, 'N M']:
    """All rows, with a piece added to those of the window."""
    at = self.start, jnp.int32(0)
    window = jax.lax.dynamic_slice(rows, at, piece.shape) + self._real(piece)
    return jax.lax.dynamic_update_slice(rows, window, at)

  def _real(self, piece):
    # Outputs and gradients of rows that belong to no expert are undefined.
    return jnp.where((jnp.arange(self.bound) < self.count)[:, None], piece, 0)


def _clipped(sizes: Int32[Array, 'X J'], bound: int) -> Int32[Array, 'X J']:
  """The sizes of the first `bound` rows of each block of rows."""
  ends = jnp.minimum(jnp.cumsum(sizes, axis=1), bound)
  return jnp.diff(ends, axis=1, prepend=0)
