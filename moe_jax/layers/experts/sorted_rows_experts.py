"""Experts without slots: rows sorted by expert, no more than are needed.

On a mesh each device sorts its own tokens' rows. Where experts are split over
devices, the rows travel to them (`parallel/ragged.py`), are sorted again there,
and travel back; where the hidden width F is split, each device adds its part.
"""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.config import choice, option
from moe_jax.kernels import grouped_ffn, grouped_matmul
from moe_jax.kernels.grouped_products import AUTO, BACKENDS
from moe_jax.layers.experts.serving import SCOPE, Dispatch, Experts
from moe_jax.layers.ffn import FfnLayer
from moe_jax.parallel.layout import layout_of
from moe_jax.parallel.ragged import RAGGED_EXCHANGES, RaggedExchange
from moe_jax.parallel.shadowing import (
  Shadowing,
  gathered,
  moved_rows,
  split,
)
from moe_jax.routing.dispatch import sorted_rows
from moe_jax.shapes import Array, Float, Int32, PRNGKey


@dataclasses.dataclass(frozen=True)
class Dropless(Dispatch):
  """The dispatch without slots: rows sorted by expert.

  It is for routers that drop nothing. Source: MegaBlocks, arXiv:2211.15841.
  """

  kind: ClassVar[str] = 'dropless'
  by_slot: ClassVar[bool] = False
  drops: ClassVar[bool] = False

  backend: str = option(
    AUTO,
    "Backend of the products of sorted rows with experts' kernels, from "
    "moe_jax.kernels; 'auto' is the fastest one of the platform.",
    choices=(AUTO, *BACKENDS),
  )
  exchange: RaggedExchange = choice(
    RAGGED_EXCHANGES,
    'all_to_all',
    'Exchange by which rows travel between devices where experts are split '
    'over several; it has no effect on one device.',
  )
  shadowing: Shadowing = option(
    Shadowing(),
    'Experts that are sent to all devices, while their tokens stay.',
  )

  def leak(self):
    """Buffers that are too small drop the rows of the last experts first."""
    if self.exchange.capacity_fraction == 1.0:
      return None
    return (
      f'dispatch.{self.kind}.exchange.capacity_fraction='
      f'{self.exchange.capacity_fraction} drops the rows of the last experts '
      'of a device first, so that later tokens change earlier outputs; use '
      'capacity_fraction=1.0'
    )

  def feed_forward(self, layer: FfnLayer) -> Experts:
    return SortedRowsExperts(layer, self, name=SCOPE)


@dataclasses.dataclass(frozen=True)
class Sorted(Dropless):
  """The dispatch of sorted rows for routers that drop what exceeds a capacity.

  It computes what `Gather` does, without empty slots: experts that few tokens
  chose cost little, and those that none chose nothing.
  """

  kind: ClassVar[str] = 'sorted'
  drops: ClassVar[bool] = True


class SortedRowsExperts(Experts):
  """E independent feed-forward layers, each with its own rows.

  Its parameters are those of `FeedForwardSlots`.

  Attributes:
    layer: The computation of one expert.
    dispatch: The options of the backend and of the exchange between devices.
  """

  layer: FfnLayer
  dispatch: Dropless

  def serve(self, x, routing, train):
    layer, shared = self.layer, self.layer.shared
    E, M = routing.num_experts, x.shape[-1]
    p = layer.parameters(self, (E,), M)
    key = self.make_rng('dropout') if train and layer.dropout else None
    x = x.astype(shared.dtype)
    layout = layout_of(
      shared.rules, x, num_experts=E, hidden=layer.options.hidden
    )
    if layout is None or self.is_initializing():
      return self._serve_local(x, routing, p, key), None
    if layer.use_bias:
      # A bias added on every device would be summed with the parts of F.
      layout = dataclasses.replace(layout, hidden=())
    split_over: dict[str | None, tuple[str, ...]] = {
      'expert': layout.experts,
      'expert_mlp': layout.hidden,
    }
    specs = {
      name: layout.spec(*(split_over.get(axis, ()) for axis in axes))
      for name, axes in layer.axes((E,), M).items()
    }
    groups = layout.spec(layout.groups)
    y, stats = jax.shard_map(
      functools.partial(self._serve_sharded, layout),
      mesh=layout.mesh,
      in_specs=(groups, groups, specs, PartitionSpec()),
      out_specs=groups,
      check_vma=False,
    )(x, routing, p, key)
    return y, jax.tree.map(lambda leaf: leaf.sum(), stats)

  def _serve_local(self, x, routing, p, key):
    """The output for all groups of one device, which has all experts."""
    with jax.named_scope('dispatch'):
      rows = sorted_rows.dispatch(x, routing)
    sizes = routing.rows_per_expert()
    rows = self._products(p, rows, sizes, key)
    with jax.named_scope('combine'):
      return sorted_rows.combine(rows, routing)

  def _serve_sharded(self, layout, x, routing, p, key):
    """The output for one device's groups, and the counts of rows that left it.

    The device has its own experts, or its part of F.
    """
    o, key = self.dispatch, _device_key(key, layout)
    counts = routing.rows_per_expert()
    sizes = self.layer.sizes(x.shape[-1], x.dtype)
    shadowed = o.shadowing.choose(layout, counts, sizes)
    sent, staying = split(routing, shadowed)
    with jax.named_scope('dispatch'):
      rows = sorted_rows.dispatch(x, sent)
    sent_counts = sent.rows_per_expert()

    # Each call of the products has a number, and with it dropout of its own.
    numbers = itertools.count(1)

    def serve(rows, sizes):
      return self._products(p, rows, sizes, _product_key(key, next(numbers)))

    overflow = jnp.int32(0)
    if layout.experts:
      rows, overflow = o.exchange.serve(layout, rows, sent_counts, serve)
    else:
      rows = serve(rows, sent_counts)
    with jax.named_scope('combine'):
      y = sorted_rows.combine(rows, sent)
    if staying is not None:
      p = gathered(layout, p, shadowed)
      y = y + self._serve_local(x, staying, p, _product_key(key, 0))
    # Each device has only summed its part of F, or of the experts.
    partial_axes = (*layout.hidden, *layout.expert_only)
    y = jax.lax.psum(y, partial_axes) if partial_axes else y
    stats = moved_rows(layout, counts, sent_counts, shadowed, overflow)
    return y, jax.tree.map(lambda leaf: leaf[None], stats)

  def _products(self, p, rows, sizes, key):
    return sorted_feed_forward(
      self.layer, p, rows, sizes, self.dispatch.backend, key
    )


def _device_key(key, layout):
  """The key of one device, whose rows or part of F no other device has."""
  if key is None:
    return None
  for name in sorted({*layout.groups, *layout.experts, *layout.hidden}):
    key = jax.random.fold_in(key, jax.lax.axis_index(name))
  return key


def _product_key(key, number):
  """The key of the dropout of the products with that number."""
  return None if key is None else jax.random.fold_in(key, number)


def sorted_feed_forward(
  layer: FfnLayer,
  p: dict[str, Any],
  x: Float[Array, 'N M'],
  group_sizes: Int32[Array, ' E'],
  backend: str = AUTO,
  dropout_key: PRNGKey | None = None,
) -> Float[Array, 'N M']:
  """The outputs of E feed-forward layers for rows sorted by layer.

  Args:
    layer: The computation of one layer.
    p: The parameters, each [E, ...].
    x: The rows. The output of rows that belong to no layer is undefined.
    group_sizes: The number of rows of each layer.
    backend: The backend of the grouped products.
    dropout_key: The key of dropout; None: nothing is dropped.
  """
  if not layer.use_bias and dropout_key is None:
    w_ins, w_out = layer.kernels(p)
    hidden = layer.activation.hidden
    return grouped_ffn(x, w_ins, w_out, group_sizes, hidden, backend)

  def add_bias(y, b):
    return y + jnp.repeat(b, group_sizes, 0, total_repeat_length=len(y))

  def dropout(h):
    if dropout_key is None:
      return h
    keep_rate = 1 - layer.dropout
    keep_mask = jax.random.bernoulli(dropout_key, keep_rate, h.shape)
    return jnp.where(keep_mask, h / keep_rate, 0)

  return layer.compute(
    p,
    x,
    product=lambda x, w, **_: grouped_matmul(x, w, group_sizes, backend),
    add_bias=add_bias,
    dropout=dropout,
  )
