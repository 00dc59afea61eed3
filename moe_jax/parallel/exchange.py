"""The exchange of expert parallelism: rows to their experts' devices and back.

GShard, https://arxiv.org/abs/2006.16668, section 3.2. Groups are split over
some mesh axes and experts over others; a row is filled on the device of its
group, and multiplied on that of its expert. Rows are `[E, R, M]`, R for each
expert.
Not here: where groups and experts are (`layout.py`), rows without slots
(`ragged.py`), and how tokens become rows (`moe_jax.dispatch`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.options import Kinds, Options, at_least, one_of, option
from moe_jax.parallel.layout import Layout, own_blocks
from moe_jax.routing import Routing, SlotRouting
from moe_jax.shapes import Array, Float

DTYPES = ('', 'bfloat16', 'float32')
DTYPE_SENTENCE = (
  "Type of expert rows while they travel between devices; '' keeps the type of "
  'the products.'
)


@dataclasses.dataclass(frozen=True)
class Exchange(Options):
  """The contract of exchanges of rows in slots.

  All are equal in value and gradient, except for experts' dropout, which is
  drawn by row: rows may come in another order.
  """

  chunks: int = option(
    1,
    'Number of pieces in which expert rows travel between devices, so that one '
    'may travel while experts multiply another; 1 sends all rows at once.',
    at_least(1),
  )
  dtype: str = option('', DTYPE_SENTENCE, one_of(*DTYPES))

  def to_experts(
    self, layout: Layout, rows: Float[Array, 'E R M']
  ) -> Float[Array, 'E R M']:
    """Moves rows split over groups to rows split over experts.

    An expert's rows may come in another order, which `to_groups` undoes.
    """
    packed = rows.astype(self.dtype or rows.dtype)
    return self._there(layout, packed).astype(rows.dtype)

  def to_groups(
    self, layout: Layout, rows: Float[Array, 'E R M']
  ) -> Float[Array, 'E R M']:
    """Undoes `to_experts`: moves rows split over experts back to groups."""
    packed = rows.astype(self.dtype or rows.dtype)
    return self._back(layout, packed).astype(rows.dtype)

  def _there(self, layout, rows):
    raise NotImplementedError

  def _back(self, layout, rows):
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constraint(Exchange):
  """An exchange by shardings, from which the compiler makes an all-to-all.

  Source: GShard.
  """

  def _there(self, layout, rows):
    return _constrained(layout, rows, there=True)

  def _back(self, layout, rows):
    return _constrained(layout, rows, there=False)


@dataclasses.dataclass(frozen=True)
class AllToAll(Exchange):
  """An exchange by an all-to-all that is written out under `shard_map`."""

  def _there(self, layout, rows):
    return jax.shard_map(
      functools.partial(_send, layout),
      mesh=layout.mesh,
      in_specs=layout.spec((), layout.groups),
      out_specs=layout.spec(layout.experts, layout.kept),
      check_vma=False,
    )(rows)

  def _back(self, layout, rows):
    return jax.shard_map(
      functools.partial(_send_back, layout),
      mesh=layout.mesh,
      in_specs=layout.spec(layout.experts, layout.kept),
      out_specs=layout.spec((), layout.groups),
      check_vma=False,
    )(rows)


EXCHANGES = Kinds(
  'exchange',
  Exchange,
  {'constraint': Constraint, 'all_to_all': AllToAll},
  inline=True,
)


@runtime_checkable
class Mover(Protocol):
  """The contract of what moves tokens, as modules of `moe_jax.dispatch` do."""

  def dispatch(
    self, x: Float[Array, 'G S M'], routing: Routing | SlotRouting
  ) -> Float[Array, 'E R M']:
    """Copies tokens to the rows of their experts."""

  def combine(
    self, rows: Float[Array, 'E R M'], routing: Routing | SlotRouting
  ) -> Float[Array, 'G S M']:
    """Sums each token's rows, weighted by its gates."""


def serve(
  exchange: Exchange,
  layout: Layout,
  mover: Mover,
  experts: Callable[[Array], Array],
  x: Float[Array, 'G S M'],
  routing: Routing | SlotRouting,
) -> Float[Array, 'G S M']:
  """Runs experts on a mesh: each device moves its groups, runs its experts.

  Args:
    exchange: The exchange by which rows travel.
    layout: The layout of groups and experts on the mesh.
    mover: The dispatch between tokens and rows.
    experts: The function from rows [E, R, M] to rows.
    x: The groups of tokens.
    routing: The routing of all groups.
  """
  with jax.named_scope('dispatch'):
    chunks = _dispatch(exchange.chunks, layout, mover, x, routing)
  for i, rows in enumerate(chunks):
    with jax.named_scope('exchange'):
      rows = exchange.to_experts(layout, rows)
    rows = experts(rows)
    with jax.named_scope('exchange'):
      chunks[i] = exchange.to_groups(layout, rows)
  with jax.named_scope('combine'):
    return _combine(layout, mover, chunks, routing)


def _dispatch(
  chunks: int,
  layout: Layout,
  mover: Mover,
  x: Float[Array, 'G S M'],
  routing: Routing | SlotRouting,
) -> list[Float[Array, 'E _ M']]:
  """`mover.dispatch` of each device's own groups: rows split over groups.

  The rows come in `chunks` pieces if they are to be exchanged, else in one.
  """

  def local(x, routing):
    rows = mover.dispatch(x, routing)
    pieces = min(chunks if layout.exchanged else 1, rows.shape[1])
    return jnp.array_split(rows, pieces, axis=1)

  groups = layout.spec(layout.groups)
  return jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=(groups, groups),
    out_specs=layout.spec((), layout.groups),
    check_vma=False,
  )(x, routing)


def _combine(
  layout: Layout,
  mover: Mover,
  chunks: Sequence[Float[Array, 'E _ M']],
  routing: Routing | SlotRouting,
) -> Float[Array, 'G S M']:
  """`mover.combine` of what `_dispatch` returned, each device's own groups."""

  def local(chunks, routing):
    return mover.combine(jnp.concatenate(chunks, axis=1), routing)

  groups = layout.spec(layout.groups)
  return jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=(layout.spec((), layout.groups), groups),
    out_specs=groups,
    check_vma=False,
  )(chunks, routing)


def _constrained(layout, rows, there):
  """The same rows with their sharding stated before and after.

  R is split into a dimension for each axis of the groups. So the compiler sees
  that some of them move from R to E; otherwise it gathers everything.
  """
  E, R, M = rows.shape
  devices = [layout.sizes[name] for name in layout.groups]
  split = rows.reshape(E, *devices, R // math.prod(devices), M)

  def stated(x, experts, groups):
    spec = [names or None for names in (experts, *groups)]
    spec = PartitionSpec(*spec, None, None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))

  at_groups = (), [(name,) for name in layout.groups]
  at_experts = (
    layout.experts,
    [(name,) if name in layout.kept else () for name in layout.groups],
  )
  before, after = (at_groups, at_experts) if there else (at_experts, at_groups)
  split = stated(stated(split, *before), *after)
  return split.reshape(E, R, M)


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
