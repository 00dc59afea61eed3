"""The exchange of expert parallelism: rows to their experts' devices and back.

GShard, https://arxiv.org/abs/2006.16668, section 3.2. Groups are split over
some mesh axes and experts over others; a row is made where its group is, and
multiplied where its expert is. Rows here are `[E, R, M]`, R for each expert.
Not here: rows without slots (`ragged.py`), and how rows come to be
(`moe_jax.dispatch`).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from moe_jax.config import unknown
from moe_jax.partitioning import spread
from moe_jax.routing import Routing, SlotRouting
from moe_jax.shapes import Array, Float, Shaped

EXCHANGES = ('constraint', 'all_to_all')
DTYPES = ('', 'bfloat16', 'float32')


@dataclasses.dataclass(frozen=True)
class ExchangeConfig:
  """How rows travel, and the mesh axes between which they do.

  Attributes:
    kind: 'constraint': shardings are stated on both sides, and the compiler
      puts an all-to-all between them (GShard). 'all_to_all': it is written out
      under `shard_map`. Equal in value and gradient, but for what experts'
      dropout draws: that is by row, and rows come in another order.
    chunks: In how many pieces; each has an all-to-all of its own, which no
      other piece's product waits for, so that the two may overlap.
    dtype: Of the rows under way; '' is that of the products.
    groups: The mesh axes that groups are split over.
    experts: Those that experts are split over.
    hidden: Those that each expert's hidden width is split over.
  """

  kind: str = 'constraint'
  chunks: int = 1
  dtype: str = ''
  groups: tuple[str, ...] = ('data', 'fsdp', 'expert')
  experts: tuple[str, ...] = ('expert',)
  hidden: tuple[str, ...] = ('tensor',)

  def __post_init__(self):
    if self.kind not in EXCHANGES:
      raise unknown('exchange', self.kind, EXCHANGES)
    if self.dtype not in DTYPES:
      raise unknown('exchange_dtype', self.dtype, DTYPES)
    if self.chunks < 1:
      raise ValueError(f'exchange_chunks={self.chunks} must be at least 1')


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where groups and experts are on the mesh at hand.

  Attributes:
    mesh: As array types carry it.
    sizes: Of every mesh axis of more than one device.
    groups, experts, hidden: The axes of `ExchangeConfig` that have more than
      one device and divide what they split.
  """

  mesh: AbstractMesh
  sizes: dict[str, int]
  groups: tuple[str, ...]
  experts: tuple[str, ...]
  hidden: tuple[str, ...]

  @property
  def exchanged(self) -> tuple[str, ...]:
    """The axes that rows cross: their groups and their experts are split."""
    return tuple(name for name in self.experts if name in self.groups)

  @property
  def kept(self) -> tuple[str, ...]:
    """The axes that still split the rows of an expert."""
    return tuple(name for name in self.groups if name not in self.experts)

  def devices(self, axes: tuple[str, ...]) -> int:
    """How many devices the axes have."""
    return math.prod(self.sizes[name] for name in axes)

  def spec(self, *axes: tuple[str, ...]) -> PartitionSpec:
    """Dimensions split over these axes."""
    return PartitionSpec(*(names or None for names in axes))


def layout(
  c: ExchangeConfig,
  x: Float[Array, 'G S M'],
  *,
  num_experts: int,
  hidden: int,
) -> Layout | None:
  """The layout of groups x on their mesh; None on one device.

  What does not divide is not split: an odd number of groups, as evaluation
  may have, is then routed and moved on every device.
  """
  axes = spread(x)
  if not axes:
    return None

  def dividing(names, size):
    names = tuple(name for name in names if name in axes)
    whole = size % math.prod(axes[name] for name in names)
    return () if whole else names

  experts = dividing(c.experts, num_experts)
  groups = dividing(c.groups, x.shape[0])
  taken = {*experts, *groups}
  splits = tuple(name for name in c.hidden if name not in taken)
  return Layout(
    mesh=jax.typeof(x).sharding.mesh,
    sizes=axes,
    groups=groups,
    experts=experts,
    hidden=dividing(splits, hidden),
  )


def to_experts(
  c: ExchangeConfig, place: Layout, rows: Float[Array, 'E R M']
) -> Float[Array, 'E R M']:
  """From rows split over groups to rows split over experts.

  Under 'all_to_all' an expert's rows may come in another order, which
  `to_groups` knows.
  """
  dtype, rows = rows.dtype, _packed(c, rows)
  if c.kind == 'constraint':
    rows = _constrained(place, rows, there=True)
  else:
    rows = jax.shard_map(
      functools.partial(_send, place),
      mesh=place.mesh,
      in_specs=place.spec((), place.groups),
      out_specs=place.spec(place.experts, place.kept),
      check_vma=False,
    )(rows)
  return rows.astype(dtype)


def to_groups(
  c: ExchangeConfig, place: Layout, rows: Float[Array, 'E R M']
) -> Float[Array, 'E R M']:
  """What `to_experts` did, undone."""
  dtype, rows = rows.dtype, _packed(c, rows)
  if c.kind == 'constraint':
    rows = _constrained(place, rows, there=False)
  else:
    rows = jax.shard_map(
      functools.partial(_send_back, place),
      mesh=place.mesh,
      in_specs=place.spec(place.experts, place.kept),
      out_specs=place.spec((), place.groups),
      check_vma=False,
    )(rows)
  return rows.astype(dtype)


def dispatch(
  c: ExchangeConfig,
  place: Layout,
  mover: ModuleType,
  x: Float[Array, 'G S M'],
  routing: Routing | SlotRouting,
) -> list[Float[Array, 'E _ M']]:
  """`mover.dispatch` of each device's own groups: rows split over groups.

  They come in `c.chunks` pieces if they are to be exchanged, else in one.
  """

  def local(x, routing):
    rows = mover.dispatch(x, routing)
    chunks = c.chunks if place.exchanged else 1
    chunks = min(chunks, rows.shape[1])
    return jnp.array_split(rows, chunks, axis=1)

  groups = place.spec(place.groups)
  return jax.shard_map(
    local,
    mesh=place.mesh,
    in_specs=(groups, groups),
    out_specs=place.spec((), place.groups),
    check_vma=False,
  )(x, routing)


def combine(
  place: Layout,
  mover: ModuleType,
  chunks: Sequence[Float[Array, 'E _ M']],
  routing: Routing | SlotRouting,
) -> Float[Array, 'G S M']:
  """`mover.combine` of what `dispatch` returned, each device's own groups."""

  def local(chunks, routing):
    return mover.combine(jnp.concatenate(chunks, axis=1), routing)

  groups = place.spec(place.groups)
  return jax.shard_map(
    local,
    mesh=place.mesh,
    in_specs=(place.spec((), place.groups), groups),
    out_specs=groups,
    check_vma=False,
  )(chunks, routing)


def _packed(c, rows):
  return rows.astype(c.dtype or rows.dtype)


def _constrained(place, rows, there):
  """The same rows with their sharding stated before and after.

  One dimension for each axis of the groups: that one of them moves from R to E
  is then plain to the compiler, which otherwise gathers everything.
  """
  E, R, M = rows.shape
  devices = [place.sizes[name] for name in place.groups]
  split = rows.reshape(E, *devices, R // math.prod(devices), M)

  def stated(x, experts, groups):
    spec = [names or None for names in (experts, *groups)]
    spec = PartitionSpec(*spec, None, None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, spec))

  at_groups = (), [(name,) for name in place.groups]
  at_experts = (
    place.experts,
    [(name,) if name in place.kept else () for name in place.groups],
  )
  before, after = (at_groups, at_experts) if there else (at_experts, at_groups)
  split = stated(stated(split, *before), *after)
  return split.reshape(E, R, M)


def _send(place, rows):
  """One device's rows of all experts -> all devices' rows of its experts."""
  rows = own_blocks(place, rows)  # [X, J, R, M]
  X, J, R, M = rows.shape
  if place.exchanged:
    rows = jax.lax.all_to_all(rows, place.exchanged, 0, 0)
  return rows.swapaxes(0, 1).reshape(J, X * R, M)


def _send_back(place, rows):
  J, XR, M = rows.shape
  X = place.devices(place.exchanged)
  rows = rows.reshape(J, X, XR // X, M).swapaxes(0, 1)  # [X, J, R, M]
  if place.exchanged:
    rows = jax.lax.all_to_all(rows, place.exchanged, 0, 0)
  return _all_blocks(place, rows)


def own_blocks(place: Layout, x: Shaped[Array, 'E ...']):
  """Under `shard_map`: what is for the experts of each device rows go to.

  `[E, ...]` -> `[X, J, ...]`: J experts on each of X devices. Of the experts'
  axes that rows do not cross, this device's part.
  """
  sizes = [place.sizes[name] for name in place.experts]
  rest = x.shape[1:]
  x = x.reshape(*sizes, -1, *rest)
  J = x.shape[len(sizes)]
  for i, name in reversed(list(enumerate(place.experts))):
    if name not in place.exchanged:
      index = jax.lax.axis_index(name)
      x = jax.lax.dynamic_index_in_dim(x, index, i, keepdims=False)
  return x.reshape(place.devices(place.exchanged), J, *rest)


def _all_blocks(place, rows):
  """What `own_blocks` did, undone: the other parts come from their devices."""
  sizes = [place.sizes[name] for name in place.exchanged]
  rows = rows.reshape(*sizes, *rows.shape[1:])
  for i, name in enumerate(place.experts):
    if name not in place.exchanged:
      rows = jax.lax.all_gather(rows, name, axis=i)
  return rows.reshape(-1, *rows.shape[-2:])
