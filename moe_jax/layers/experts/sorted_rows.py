"""Experts without slots: rows sorted by expert, no more than are needed.

On a mesh each device sorts its own tokens' rows. Where experts are split over
devices, the rows travel to them (`parallel/ragged.py`), are sorted again there,
and travel back; where the hidden width F is split, each device adds its part.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.kernels import grouped_ffn, grouped_matmul
from moe_jax.kernels.grouped_products import AUTO
from moe_jax.layers.experts.dispatch_options import Dropless
from moe_jax.layers.ffn import FfnLayer
from moe_jax.parallel.layout import Layout
from moe_jax.parallel.shadowing import gathered, moved_rows, split
from moe_jax.routing import AnyRouting, ExchangeStats
from moe_jax.routing.dispatch import sorted_rows
from moe_jax.shapes import Array, Float, Int32, PRNGKey


def apply_to_sorted_rows(
  ffn: FfnLayer,
  params: dict[str, Any],
  x: Float[Array, 'G S M'],
  routing: AnyRouting,
  dispatch: Dropless,
  layout: Layout | None,
  dropout_key: PRNGKey | None,
) -> tuple[Float[Array, 'G S M'], ExchangeStats | None]:
  """The gated sums of experts' outputs, and counts of what devices exchanged.

  The counts are None on one device.

  Args:
    ffn: The computation of one expert.
    params: The parameters, each [E, ...].
    x: The groups of tokens.
    routing: The routing of the groups.
    dispatch: The backend of the products, and the exchange.
    layout: The layout of groups and experts on a mesh; None on one device.
    dropout_key: The key of dropout; None: nothing is dropped.
  """

  def products(params, rows, sizes, key):
    return sorted_feed_forward(ffn, params, rows, sizes, dispatch.backend, key)

  def on_one_device(x, routing, params, key):
    """The output for all groups of one device, which has all experts."""
    with jax.named_scope('dispatch'):
      rows = sorted_rows.dispatch(x, routing)
    rows = products(params, rows, routing.rows_per_expert(), key)
    with jax.named_scope('combine'):
      return sorted_rows.combine(rows, routing)

  E, M = routing.num_experts, x.shape[-1]
  x = x.astype(ffn.shared.dtype)
  if layout is None:
    return on_one_device(x, routing, params, dropout_key), None
  if ffn.use_bias:
    # A bias that each device added to its part of F would count several times.
    layout = dataclasses.replace(layout, hidden=())

  def on_each_device(x, routing, params, key):
    """The output for one device's groups, and counts of the rows it sends.

    A device holds some of the experts, or a part of the hidden width F of all.
    """
    key = _device_key(key, layout)
    counts = routing.rows_per_expert()
    shadowed = dispatch.shadowing.choose(layout, counts, ffn.sizes(M, x.dtype))
    sent, staying = split(routing, shadowed)
    with jax.named_scope('dispatch'):
      rows = sorted_rows.dispatch(x, sent)
    sent_counts = sent.rows_per_expert()

    # Each call of `products` has a number, and with it dropout of its own.
    numbers = itertools.count(1)

    def experts(rows, sizes):
      return products(params, rows, sizes, _product_key(key, next(numbers)))

    overflow = jnp.int32(0)
    if layout.experts:
      rows, overflow = dispatch.exchange.exchange_rows(
        layout, rows, sent_counts, experts
      )
    else:
      rows = experts(rows, sent_counts)
    with jax.named_scope('combine'):
      y = sorted_rows.combine(rows, sent)
    if staying is not None:
      copies = gathered(layout, params, shadowed)
      y = y + on_one_device(x, staying, copies, _product_key(key, 0))
    # Each device has only summed over its part of F, or over its experts.
    partial_axes = (*layout.hidden, *layout.expert_only)
    y = jax.lax.psum(y, partial_axes) if partial_axes else y
    stats = moved_rows(layout, counts, sent_counts, shadowed, overflow)
    return y, jax.tree.map(lambda leaf: leaf[None], stats)

  groups = layout.spec(layout.groups)
  specs = layout.parameter_specs(ffn.axes((E,), M))
  y, stats = jax.shard_map(
    on_each_device,
    mesh=layout.mesh,
    in_specs=(groups, groups, specs, PartitionSpec()),
    out_specs=groups,
    check_vma=False,
  )(x, routing, params, dropout_key)
  return y, jax.tree.map(lambda leaf: leaf.sum(), stats)


def _device_key(key, layout):
  """The key of dropout of one device.

  Devices with other rows, other experts or another part of F have other keys.
  """
  if key is None:
    return None
  for name in sorted({*layout.groups, *layout.experts, *layout.hidden}):
    key = jax.random.fold_in(key, jax.lax.axis_index(name))
  return key


def _product_key(key, number):
  """The key of dropout for the call of the products with this number."""
  return None if key is None else jax.random.fold_in(key, number)


def sorted_feed_forward(
  ffn: FfnLayer,
  params: dict[str, Any],
  x: Float[Array, 'N M'],
  group_sizes: Int32[Array, ' E'],
  backend: str = AUTO,
  dropout_key: PRNGKey | None = None,
) -> Float[Array, 'N M']:
  """The outputs of E feed-forward layers for rows sorted by layer.

  Args:
    ffn: The computation of one layer.
    params: The parameters, each [E, ...].
    x: The rows. The output of rows that belong to no layer is undefined.
    group_sizes: The number of rows of each layer.
    backend: The backend of the grouped products.
    dropout_key: The key of dropout; None: nothing is dropped.
  """
  if not ffn.use_bias and dropout_key is None:
    w_ins = tuple(params[name] for name in ffn.first_kernels)
    hidden, w_out = ffn.activation.hidden, params['w_out']
    return grouped_ffn(x, w_ins, w_out, group_sizes, hidden, backend)

  def add_bias(y, b):
    return y + jnp.repeat(b, group_sizes, 0, total_repeat_length=len(y))

  return ffn.compute(
    params,
    x,
    product=lambda x, w, **_: grouped_matmul(x, w, group_sizes, backend),
    add_bias=add_bias,
    dropout=lambda h: ffn.dropped(h, dropout_key),
  )
