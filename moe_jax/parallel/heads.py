"""Attention on a mesh: each device computes its own sequences and heads."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from moe_jax.partitioning import MESH_AXES, spread
from moe_jax.shapes import Array, Float, Float32, Int


def on_rows_and_heads(
  f: Callable[..., Array],
  query: Float[Array, 'B T H D'],
  key: Float[Array, 'B T N D'],
  value: Float[Array, 'B T N U'],
  segment_ids: Int[Array, 'B T'] | None,
  sinks: Float32[Array, ' H'] | None,
) -> Float[Array, 'B T H U']:
  """The result of f, which each device calls on its own rows and heads.

  A compiler could not split f over devices where f is a kernel. Rows or heads
  that do not divide by their mesh axes are computed whole on each device.

  Args:
    f: The function f(query, key, value, segment_ids, sinks) -> weighted means
      of values, [B, T, H, U], of the rows and heads of its arguments.
    query: The queries of H heads.
    key: The keys of N heads; the last mesh axis splits heads if it divides N.
    value: The values of N heads, of width U.
    segment_ids: The segment of each token; None: each row is one segment.
    sinks: The sink of each head, or None.
  """
  axis_sizes = spread(query)
  if not axis_sizes:
    return f(query, key, value, segment_ids, sinks)
  *row_axes, head_axis = MESH_AXES
  row_axes = tuple(name for name in row_axes if name in axis_sizes)
  if query.shape[0] % math.prod(axis_sizes[name] for name in row_axes):
    row_axes = ()
  if head_axis not in axis_sizes or key.shape[2] % axis_sizes[head_axis]:
    head_axis = None
  heads_spec = PartitionSpec(row_axes or None, None, head_axis, None)
  ids_spec = PartitionSpec(row_axes or None, None)
  return jax.shard_map(
    f,
    mesh=jax.typeof(query).sharding.mesh,
    in_specs=(*[heads_spec] * 3, ids_spec, PartitionSpec(head_axis)),
    out_specs=heads_spec,
    check_vma=False,
  )(query, key, value, segment_ids, sinks)
