"""Experts without capacity: rows sorted by expert, no more than are needed.

On a mesh each device sorts its own tokens' rows. Where experts are split over
devices, the rows travel to them (`parallel/ragged.py`), are sorted again there,
and travel back; where the hidden width F is split, each device adds its part.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.dispatch import sorted_rows
from moe_jax.kernels import grouped_ffn, grouped_matmul
from moe_jax.kernels.backends import AUTO, BACKENDS
from moe_jax.layers.experts.serving import SCOPE, Dispatch, Experts
from moe_jax.layers.ffn import FfnLayer
from moe_jax.options import one_of, option
from moe_jax.parallel.exchange import DTYPE_SENTENCE, DTYPES
from moe_jax.parallel.layout import Layout, layout_of
from moe_jax.parallel.ragged import plan
from moe_jax.shapes import Array, Float, Int32, PRNGKey


@dataclasses.dataclass(frozen=True)
class Dropless(Dispatch):
  """The dispatch without slots: rows sorted by expert.

  It is for routers that drop nothing. Source: MegaBlocks, arXiv:2211.15841.
  """

  by_slot: ClassVar[bool] = False

  backend: str = option(
    AUTO,
    "Backend of the products of sorted rows with experts' kernels, from "
    "moe_jax.kernels; 'auto' is the fastest one of the platform.",
    one_of(AUTO, *BACKENDS),
  )
  exchange_dtype: str = option('', DTYPE_SENTENCE, one_of(*DTYPES))

  def feed_forward(self, layer: FfnLayer) -> Experts:
    """See `Dispatch.feed_forward`."""
    return SortedRowsExperts(layer, self, name=SCOPE)


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
    """See `Experts.serve`."""
    layer, shared = self.layer, self.layer.shared
    E, M = routing.num_experts, x.shape[-1]
    p = layer.parameters(self, (E,), M)
    key = self.make_rng('dropout') if train and layer.dropout else None
    x = x.astype(shared.dtype)
    layout = layout_of(
      shared.rules, x, num_experts=E, hidden=layer.options.hidden
    )
    if layout is None or self.is_initializing():
      return self._serve_locally(None, x, routing, p, key), None
    if shared.use_bias:
      # A bias added on every device would be summed with the parts of F.
      layout = dataclasses.replace(layout, hidden=())
    split = {'expert': layout.experts, 'expert_mlp': layout.hidden}
    specs = {
      name: layout.spec(*(split.get(axis, ()) for axis in axes))
      for name, axes in layer.axes((E,), M).items()
    }
    groups = layout.spec(layout.groups)
    y = jax.shard_map(
      functools.partial(self._serve_locally, layout),
      mesh=layout.mesh,
      in_specs=(groups, groups, specs, PartitionSpec()),
      out_specs=groups,
      check_vma=False,
    )(x, routing, p, key)
    return y, None

  def _serve_locally(self, layout, x, routing, p, key):
    """The output for one device's groups, by its experts and its part of F."""
    with jax.named_scope('dispatch'):
      rows = sorted_rows.dispatch(x, routing)
    sizes = sorted_rows.group_sizes(routing)
    serve = functools.partial(
      sorted_feed_forward, self.layer, p, backend=self.dispatch.backend
    )
    if layout is None:
      rows = serve(rows, sizes, dropout_key=key)
    else:
      serve = functools.partial(serve, dropout_key=_own_key(key, layout))
      dtype = self.dispatch.exchange_dtype
      rows = _exchanged(dtype, layout, rows, sizes, serve)
    with jax.named_scope('combine'):
      y = sorted_rows.combine(rows, routing)
    if layout is None:
      return y
    # Each device has only summed its part of F, or of the experts.
    apart = tuple(n for n in layout.experts if n not in layout.exchanged)
    parts = (*layout.hidden, *apart)
    return jax.lax.psum(y, parts) if parts else y


def _exchanged(dtype, layout: Layout, rows, sizes, serve):
  """Sends rows to the devices of their experts, serves them, and sends back."""
  if not layout.experts:
    return serve(rows, sizes)
  with jax.named_scope('exchange'):
    trip = plan(layout, len(rows), sizes)
    packed = rows.astype(dtype or rows.dtype)
    there = trip.there(packed).astype(rows.dtype)
  served = serve(there, trip.local_sizes)
  with jax.named_scope('exchange'):
    back = trip.back(served.astype(packed.dtype))
  return back.astype(rows.dtype)


def _own_key(key, layout):
  """The key of one device, whose rows or part of F no other device has."""
  if key is None:
    return None
  for name in sorted({*layout.groups, *layout.experts, *layout.hidden}):
    key = jax.random.fold_in(key, jax.lax.axis_index(name))
  return key


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
  if not layer.shared.use_bias and dropout_key is None:
    w_ins, w_out = layer.kernels(p)
    hidden = layer.activation.hidden
    return grouped_ffn(x, w_ins, w_out, group_sizes, hidden, backend)

  def add_bias(y, b):
    return y + jnp.repeat(b, group_sizes, 0, total_repeat_length=len(y))

  def dropout(h):
    if dropout_key is None:
      return h
    left = 1 - layer.dropout
    kept = jax.random.bernoulli(dropout_key, left, h.shape)
    return jnp.where(kept, h / left, 0)

  return layer.compute(
    p,
    x,
    product=lambda x, w, **_: grouped_matmul(x, w, group_sizes, backend),
    add_bias=add_bias,
    dropout=dropout,
  )
