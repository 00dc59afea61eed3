"""Attention by JAX's blockwise kernel for the TPU."""

import math
from typing import cast

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from moe_jax.layers.attention.keys import Keys
from moe_jax.partitioning import MESH_AXES, spread
from moe_jax.shapes import Array, Float, Float32, Int

# The smallest side of a block, and the sides that are tried in this order, as
# larger blocks make fewer steps.
LEAST_BLOCK, _BLOCKS = 128, (512, 256, 128)


def splash(
  query: Float[Array, 'B T H D'],
  key: Float[Array, 'B T N D'],
  value: Float[Array, 'B T N D'],
  segment_ids: Int[Array, 'B T'] | None,
  key_segment_ids: Int[Array, 'B T'] | None,
  *,
  keys: Keys,
  sinks: Float32[Array, ' H'] | None = None,
  interpret: bool = False,
) -> Float[Array, 'B T H D']:
  """Attention by the TPU's blockwise kernel, which stores no scores or mask."""
  del key_segment_ids  # they are those of the queries

  def local(query, key, value, segment_ids, sinks):
    T, H = query.shape[1:3]
    kernel = _splash_kernel(T, H, keys, interpret)

    def row(query, key, value, ids):
      ids = None if ids is None else splash_attention.SegmentIds(ids, ids)
      return kernel(query, key, value, segment_ids=ids, sinks=sinks)

    q, k, v = (x.swapaxes(1, 2) for x in (keys.scaled(query), key, value))
    y = cast(Array, jax.vmap(row)(q, k, v, segment_ids))
    return y.swapaxes(1, 2)

  return _on_each_device(local, query, key, value, segment_ids, sinks)


def _splash_kernel(T, H, keys, interpret):
  mask = splash_attention.FullMask((T, T))
  if keys.window:
    window = (keys.window - 1, 0)
    mask = splash_attention.LocalMask((T, T), window, offset=0)
  elif keys.causal:
    mask = splash_attention.CausalMask((T, T))
  side = next(block for block in _BLOCKS if T % block == 0)
  return splash_attention.make_splash_mha(
    mask=splash_attention.MultiHeadMask([mask] * H),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash_attention.BlockSizes(
      block_q=side,
      block_kv=side,
      block_q_dkv=side,
      block_kv_dkv=side,
      block_q_dq=side,
      block_kv_dq=side,
    ),
    interpret=interpret,
  )


def _on_each_device(f, query, key, value, segment_ids, sinks):
  """f on every device's own rows and heads, as compilers cannot split kernels.

  Rows or heads that do not divide by their mesh axes are computed whole on each
  device.
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
  return jax.shard_map(
    f,
    mesh=jax.typeof(query).sharding.mesh,
    in_specs=(
      *[heads_spec] * 3,
      PartitionSpec(row_axes or None, None),
      PartitionSpec(head_axis),
    ),
    out_specs=heads_spec,
    check_vma=False,
  )(query, key, value, segment_ids, sinks)
