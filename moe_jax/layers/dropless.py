"""Experts without capacity: each device serves its own tokens.

Rows are sorted by expert on the device that has the tokens, and meet all
experts' kernels there; on a mesh these are gathered, and split over `tensor`
where F divides. Not here: an exchange that brings tokens to their experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from moe_jax.dispatch import dropless
from moe_jax.kernels import grouped_ffn, grouped_matmul
from moe_jax.layers.ffn import FfnConfig, activation, compute, parameters
from moe_jax.partitioning import on_each_device, spread
from moe_jax.routing import Routing
from moe_jax.shapes import Array, Float, Int32, PRNGKey


class DroplessExperts(nn.Module):
  """E independent `FeedForward` layers on the rows that each has.

  Its parameters are those of `Experts`.

  Attributes:
    config: One expert.
    backend: Of the grouped products; see `kernels.grouped_matmul`.
  """

  config: FfnConfig
  backend: str = 'auto'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'G S M'], routing: Routing, train: bool = False
  ) -> Float[Array, 'G S M']:
    """Dispatches, applies the experts, combines; dropout only if `train`."""
    c = self.config
    p = parameters(self, c, (routing.num_experts,), x.shape[-1])
    key = self.make_rng('dropout') if train and c.dropout else None
    axes, G = spread(x), x.shape[0]
    split = axes.get('tensor', 0) > 1 and c.hidden % axes['tensor'] == 0
    # A bias added on every device would be summed with the halves.
    split = split and not c.use_bias and not self.is_initializing()

    def local(x, routing, p, key):
      if key is not None:
        key = _own_key(key, axes, x.shape[0] < G, split)
      with jax.named_scope('dispatch'):
        rows = dropless.dispatch(x, routing)
      sizes = dropless.group_sizes(routing)
      rows = sorted_feed_forward(c, p, rows, sizes, self.backend, key)
      with jax.named_scope('combine'):
        y = dropless.combine(rows, routing)
      return jax.lax.psum(y, 'tensor') if split else y

    specs = {name: PartitionSpec() for name in p}
    if split:
      specs |= {n: PartitionSpec(None, None, 'tensor') for n in c.first_kernels}
      specs['w_out'] = PartitionSpec(None, 'tensor')
    return on_each_device(
      local, (x.astype(c.dtype), routing), (p, key), (specs, PartitionSpec())
    )


def _own_key(key, axes, own_rows, split):
  """A key for what differs between devices: the rows, the part of F."""
  differ = {name for name in axes if name != 'tensor' and own_rows}
  for name in sorted(differ | ({'tensor'} if split else set())):
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
