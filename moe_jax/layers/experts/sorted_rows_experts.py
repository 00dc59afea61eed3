"""Experts without capacity: rows sorted by expert, as many as there are.

On a mesh each device sorts its own tokens' rows. Where experts are split over
devices the rows travel to them (`parallel/ragged.py`), are sorted again there,
and travel back; where F is split, each device adds its part.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from moe_jax.dispatch import dropless
from moe_jax.kernels import grouped_ffn, grouped_matmul
from moe_jax.layers.ffn import FfnConfig, activation, compute, parameters
from moe_jax.parallel.exchange import ExchangeConfig, layout
from moe_jax.parallel.ragged import plan
from moe_jax.routing import Routing, SlotRouting
from moe_jax.shapes import Array, Float, Int32, PRNGKey


class DroplessExperts(nn.Module):
  """E independent `FeedForward` layers on the rows that each has.

  Its parameters are those of `Experts`.

  Attributes:
    config: One expert.
    backend: Of the grouped products; see `kernels.grouped_matmul`.
    exchange: Between which mesh axes rows travel, and as what.
  """

  config: FfnConfig
  backend: str = 'auto'
  exchange: ExchangeConfig = ExchangeConfig()

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'G S M'],
    routing: Routing | SlotRouting,
    train: bool = False,
  ) -> Float[Array, 'G S M']:
    """Dispatches, applies the experts, combines; dropout only if `train`."""
    c = self.config
    p = parameters(self, c, (routing.num_experts,), x.shape[-1])
    key = self.make_rng('dropout') if train and c.dropout else None
    x = x.astype(c.dtype)
    place = layout(
      self.exchange, x, num_experts=routing.num_experts, hidden=c.hidden
    )
    if place is None or self.is_initializing():
      return self._serve(None, x, routing, p, key)
    if c.use_bias:
      # A bias added on every device would be summed with the parts of F.
      place = dataclasses.replace(place, hidden=())
    experts, hidden = place.experts, place.hidden
    specs = {name: place.spec(experts) for name in p}
    specs |= {n: place.spec(experts, (), hidden) for n in c.first_kernels}
    specs['w_out'] = place.spec(experts, hidden)
    groups = place.spec(place.groups)
    return jax.shard_map(
      functools.partial(self._serve, place),
      mesh=place.mesh,
      in_specs=(groups, groups, specs, PartitionSpec()),
      out_specs=groups,
      check_vma=False,
    )(x, routing, p, key)

  def _serve(self, place, x, routing, p, key):
    """One device's groups, with the experts and the part of F it has."""
    with jax.named_scope('dispatch'):
      rows = dropless.dispatch(x, routing)
    sizes = dropless.group_sizes(routing)
    serve = functools.partial(
      sorted_feed_forward, self.config, p, backend=self.backend
    )
    if place is None:
      rows = serve(rows, sizes, dropout_key=key)
    else:
      serve = functools.partial(serve, dropout_key=_own_key(key, place))
      rows = _exchanged(self.exchange, place, rows, sizes, serve)
    with jax.named_scope('combine'):
      y = dropless.combine(rows, routing)
    if place is None:
      return y
    # Each has added what it has: of F, or of the experts that share its rows.
    apart = tuple(n for n in place.experts if n not in place.exchanged)
    parts = (*place.hidden, *apart)
    return jax.lax.psum(y, parts) if parts else y


def _exchanged(c, place, rows, sizes, serve):
  """Rows of all experts to those that have them, served, and back."""
  if not place.experts:
    return serve(rows, sizes)
  with jax.named_scope('exchange'):
    trip = plan(place, len(rows), sizes)
    dtype, packed = rows.dtype, rows.astype(c.dtype or rows.dtype)
    there = trip.there(packed).astype(dtype)
  served = serve(there, trip.local_sizes)
  with jax.named_scope('exchange'):
    back = trip.back(served.astype(packed.dtype))
  return back.astype(dtype)


def _own_key(key, place):
  """A key for what differs between devices: the rows, the part of F."""
  if key is None:
    return None
  for name in sorted({*place.groups, *place.experts, *place.hidden}):
    key = jax.random.fold_in(key, jax.lax.axis_index(name))
  return key


def sorted_feed_forward(
  c: FfnConfig,
  p: dict[str, Any],
  x: Float[Array, 'N M'],
  group_sizes: Int32[Array, ' E'],
  backend: str = 'auto',
  dropout_key: PRNGKey | None = None,
) -> Float[Array, 'N M']:
  """E feed-forward layers on rows sorted by layer.

  Args:
    c: One of them.
    p: Parameters, each [E, ...].
    x: Rows. Those of no layer come out with numbers that mean nothing.
    group_sizes: Rows of each layer.
    backend: Of the grouped products.
    dropout_key: None is no dropout.
  """
  if not c.use_bias and dropout_key is None:
    w_ins = tuple(p[name] for name in c.first_kernels)
    hidden = activation(c.activation).hidden
    return grouped_ffn(x, w_ins, p['w_out'], group_sizes, hidden, backend)

  def add_bias(y, b):
    return y + jnp.repeat(b, group_sizes, 0, total_repeat_length=len(y))

  def dropout(h):
    if dropout_key is None:
      return h
    kept = jax.random.bernoulli(dropout_key, 1 - c.dropout, h.shape)
    return jnp.where(kept, h / (1 - c.dropout), 0)

  return compute(
    c,
    p,
    x,
    product=lambda x, w, **_: grouped_matmul(x, w, group_sizes, backend),
    add_bias=add_bias,
    dropout=dropout,
  )
