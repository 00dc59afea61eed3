"""The experts: E feed-forward layers on E lists of rows.

This file alone multiplies expert rows. How rows come to be is
`moe_jax.dispatch`.
"""

import functools

from flax import linen as nn

from moe_jax.layers.ffn import FfnConfig, activation
from moe_jax.layers.initializers import zeros
from moe_jax.layers.matmul import rows_matmul
from moe_jax.shapes import Array, Float


class Experts(nn.Module):
  """E independent `FeedForward` layers, expert e on rows[e].

  Every expert starts from its own draw, with the fan-in of one expert. With
  E=1 it is the dense layer.
  """

  config: FfnConfig

  @nn.compact
  def __call__(
    self, rows: Float[Array, 'E R M'], train: bool = False
  ) -> Float[Array, 'E R M']:
    """Applies expert e to rows[e]; dropout only if `train`."""
    c = self.config
    E, _, M = rows.shape
    F = c.hidden
    function, gated = activation(c.activation)
    param = functools.partial(self.param, unbox=True)
    rows = rows.astype(c.dtype)

    def kernel(name, shape, axes, residual=False):
      init = c.init.kernel(axes, residual=residual)
      return param(name, init, shape, c.param_dtype).astype(c.dtype)

    def bias(name, width, axis):
      init = zeros(('expert', axis))
      b = param(name, init, (E, width), c.param_dtype).astype(c.dtype)
      return b[:, None]

    into = ('expert', 'embed', 'expert_mlp')
    h = rows_matmul(rows, kernel('w_in', (E, M, F), into))  # [E, R, F]
    if c.use_bias:
      h = h + bias('b_in', F, 'expert_mlp')
    if gated:
      gate = rows_matmul(rows, kernel('w_gate', (E, M, F), into))
      h = function(gate) * h
    else:
      h = function(h)
    h = nn.Dropout(c.dropout, deterministic=not train)(h)
    out = ('expert', 'expert_mlp', 'embed')
    y = rows_matmul(h, kernel('w_out', (E, F, M), out, residual=True))
    if c.use_bias:
      y = y + bias('b_out', M, 'embed')
    return y


def vmapped(expert: nn.Module, rows: Float[Array, 'E R M']):
  """Any linen module `[R, M] -> [R, M]` as the experts, one copy an expert."""
  apply = nn.vmap(
    lambda module, x: module(x),
    in_axes=0,
    out_axes=0,
    axis_size=rows.shape[0],
    variable_axes={'params': 0},
    split_rngs={'params': True, 'dropout': True},
    metadata_params={nn.PARTITION_NAME: 'expert'},
  )
  return apply(expert, rows)
