"""The exchange of expert parallelism: rows to their experts' devices and back.

GShard, https://arxiv.org/abs/2006.16668, section 3.2. Where a mesh axis splits
both groups and experts, a row is filled on the device of its group, and
multiplied on the device of its expert. Rows are `[E, R, M]`, R for each expert.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import Kinds, Options, option, required
from moe_jax.parallel.layout import Layout, own_blocks
from moe_jax.parallel.shadowing import Shadowing
from moe_jax.routing.capacity import PerToken
from moe_jax.shapes import Array, Float, Leaf


@dataclasses.dataclass(frozen=True)
class Exchange(Options):
  """The contract of exchanges between devices, of the rows in experts' slots.

  Rows travel in pieces, arrays that are moved in turn; by default, all rows are
  one piece. Exchanges are equal in value and gradient, except for experts'
  dropout, since rows may come in another order. Where no mesh axis splits both
  groups and experts, no rows travel, and `Constraint` replaces any exchange.

  Attributes:
    gathers: Whether tokens are gathered on all devices in place of rows that
      travel.
  """

  gathers: ClassVar[bool] = False

  capacity_fraction: float = option(
    1.0,
    'Share of the slots that an expert has on a device, of all groups there, '
    'for which the exchange has room; choices beyond it are dropped, and '
    'counted as exchange_overflow. 1.0 has room for all.',
    above=0,
    maximum=1,
  )

  def capacity(self, slots: int) -> int:
    """How many of an expert's `slots` on a device the exchange has room for."""
    return PerToken(self.capacity_fraction).per_expert(slots, 1, 1)

  def leak(self, shadowing: Shadowing) -> str | None:
    """The reason why later tokens change earlier outputs; None if they do not.

    They do where the exchange drops rows and experts are shadowed: the choices
    of all tokens decide which experts are shadowed, and so which rows may drop.
    """
    fraction = self.capacity_fraction
    if fraction == 1.0 or not shadowing.experts:
      return None
    return (
      f"the dispatch's exchange.capacity_fraction={fraction} drops rows that "
      f'shadowing.experts={shadowing.experts} may spare, as all tokens decide, '
      'so that later tokens change earlier outputs; use capacity_fraction=1.0'
    )

  def cut(
    self, layout: Layout, rows: Float[Array, 'E R M']
  ) -> list[Float[Array, '_ _ M']]:
    """The pieces of one device's rows, in the order in which they travel.

    The method is called under `shard_map`. A piece is [_, _, M]: dimension 0 is
    of experts, all or some, and dimension 1 of their rows.
    """
    del layout
    return [rows]

  def joined(
    self, layout: Layout, pieces: Sequence[Float[Array, '_ _ M']]
  ) -> Float[Array, 'E R M']:
    """The rows that `cut` cut into these pieces; called under `shard_map`."""
    del layout
    (rows,) = pieces
    return rows

  def pieces_spec(self, layout: Layout) -> PartitionSpec:
    """How the mesh splits a piece, of which `cut` returns one device's part."""
    return layout.spec((), layout.groups)

  @required
  def move(
    self,
    layout: Layout,
    rows: Float[Array, '_ _ M'],
    to_experts: bool,
    number: int = 0,
  ) -> Float[Array, '_ _ M']:
    """Moves a piece of rows to the devices of their experts, or back.

    An expert's rows may come in another order, which the way back undoes.

    Args:
      layout: The layout of groups and experts.
      rows: The piece, of whose dimension 1 each device has a part; on the way
        back rows [E, ...] split over experts.
      to_experts: Whether rows go to their experts.
      number: The index of the piece in the list that `cut` returned.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constraint(Exchange):
  """An exchange by shardings, from which the compiler makes an all-to-all.

  Source: GShard.
  """

  def move(self, layout, rows, to_experts, number=0):
    """States the sharding of the same rows before and after they travel.

    All rows are one piece, so that `number` is not read.
    The dimension R of rows is first reshaped into one dimension for each mesh
    axis that splits groups, and one for the rows of a device. In this shape the
    compiler sees that some mesh axes move from rows to the dimension E of
    experts; otherwise it would gather all rows.
    """
    E, R, M = rows.shape
    devices = [layout.sizes[name] for name in layout.groups]
    split_rows = rows.reshape(E, *devices, R // math.prod(devices), M)

    def constrained(x, experts, groups):
      spec = [names or None for names in (experts, *groups)]
      spec = PartitionSpec(*spec, None, None)
      return jax.lax.with_sharding_constraint(
        x, NamedSharding(layout.mesh, spec)
      )

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


@dataclasses.dataclass(frozen=True)
class InRing(Exchange):
  """The smart schedule of FasterMoE: rows travel along a ring, step by step.

  He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418, section 4.2,
  with one device at each of the W places of the ring. In step j device i does
  S_j: it sends rows to the experts of device i - j and receives from i + j;
  C_j: its experts multiply these rows; and R_j: it returns the results. The
  rows of step 0 stay on the device. S_j, C_j, R_j depend on one another, and
  steps do not, so that a compiler may send in one step while experts multiply
  in another. All S_j are asked for first, then all C_j, then all R_j, as
  published.
  """

  def cut(self, layout, rows):
    """Cuts rows into a piece for each step of the ring.

    A piece has the rows for the device to which this device sends in that step.
    The first piece has the rows that stay on this device.
    """
    blocks = own_blocks(layout, rows)  # [X, J, R, M]
    return [blocks[target] for target in _targets(layout)]

  def joined(self, layout, pieces):
    rows = jnp.stack(pieces)  # [X, J, R, M], in the order of the steps
    blocks = jnp.zeros_like(rows).at[jnp.stack(_targets(layout))].set(rows)
    return _all_blocks(layout, blocks)

  def pieces_spec(self, layout):
    return layout.spec(layout.expert_only, layout.groups)

  def move(self, layout, rows, to_experts, number=0):
    at_groups = self.pieces_spec(layout)
    at_experts = layout.spec(layout.experts, layout.group_only)
    before, after = (
      (at_groups, at_experts) if to_experts else (at_experts, at_groups)
    )
    return jax.shard_map(
      functools.partial(permuted, layout, number=number, to_experts=to_experts),
      mesh=layout.mesh,
      in_specs=before,
      out_specs=after,
      check_vma=False,
    )(rows)


@dataclasses.dataclass(frozen=True)
class AllGather(Constraint):
  """An exchange in which tokens are gathered, and no rows travel.

  `gather_exchange.py` does what these options say.
  """

  gathers: ClassVar[bool] = True

  def problems(self) -> Iterator[str]:
    yield from self.in_vain('as all tokens travel', 'capacity_fraction')


EXCHANGES = Kinds(
  'exchange',
  Exchange,
  {'constraint': Constraint, 'ring': InRing, 'all_gather': AllGather},
  inline=True,
)


def target(layout: Layout, device: Leaf, step: int) -> Leaf:
  """The device to which `device` sends in a step; both are ring indices."""
  return (device - step) % layout.devices(layout.exchanged)


def _targets(layout: Layout) -> list[Leaf]:
  """The ring index to which this device sends in each step of the ring."""
  me = jax.lax.axis_index(layout.exchanged)
  steps = range(layout.devices(layout.exchanged))
  return [target(layout, me, step) for step in steps]


def permuted(
  layout: Layout,
  rows: Float[Array, '*R M'],
  number: int,
  to_experts: bool = True,
) -> Float[Array, '*R M']:
  """The rows that a device receives in step `number` of the ring.

  The argument `rows` has those that the device sends in this step. Where
  `to_experts` is False, the rows that it sent in this step return to it. The
  function is called under `shard_map`. Step 0 moves nothing.
  """
  if number == 0:
    return rows
  devices = range(layout.devices(layout.exchanged))
  pairs = [(d, target(layout, d, number)) for d in devices]
  if not to_experts:
    pairs = [(target, source) for source, target in pairs]
  axes, numbers = _in_mesh_order(layout)
  pairs = [(numbers[source], numbers[target]) for source, target in pairs]
  return jax.lax.ppermute(rows, axes, pairs)


def _in_mesh_order(layout: Layout) -> tuple[tuple[str, ...], list[int]]:
  """The axes that rows travel along, in the mesh's order, and devices' indices.

  The list has the index in the mesh's order of each device, where devices are
  counted in the order of `layout.exchanged`. `ppermute` counts devices in the
  mesh's order, however its axes are given; all other collectives count in the
  order of their axes.
  """
  given, order = layout.exchanged, layout.mesh.axis_names
  axes = tuple(sorted(given, key=order.index))
  devices = np.arange(layout.devices(given))
  devices = devices.reshape([layout.sizes[name] for name in given])
  devices = devices.transpose([given.index(name) for name in axes])
  return axes, np.argsort(devices, axis=None).tolist()


def _all_blocks(layout, rows):
  """The rows [E, R, M] of all experts, from a device's blocks [X, J, R, M].

  X devices, along the axes that rows travel along, have J experts each. Those
  of devices along `layout.expert_only` are gathered.
  """
  sizes = [layout.sizes[name] for name in layout.exchanged]
  rows = rows.reshape(*sizes, *rows.shape[1:])
  for i, name in enumerate(layout.experts):
    if name not in layout.exchanged:
      rows = jax.lax.all_gather(rows, name, axis=i)
  return rows.reshape(-1, *rows.shape[-2:])
