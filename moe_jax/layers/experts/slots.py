"""The experts: E feed-forward layers on E lists of rows.

This file and `sorted_rows_experts.py` alone have expert rows multiplied. How
rows come to be is `moe_jax.dispatch`.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn

from moe_jax.layers.ffn import FfnConfig, feed_forward
from moe_jax.shapes import Array, Float, Shaped


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
    return feed_forward(self, self.config, rows, train)


def vmapped(
  expert: nn.Module, rows: Float[Array, 'E R M']
) -> Float[Array, 'E R M']:
  """Any linen module `[R, M] -> [R, M]` as the experts, one copy an expert."""
  return copied(lambda module, x: module(x), expert, rows)


def copied(
  call: Callable[..., Any],
  expert: nn.Module,
  *arguments: Shaped[Array, 'E ...'],
) -> Any:
  """call(copy e, *arguments[e]) of each expert e, stacked."""
  apply = nn.vmap(
    call,
    in_axes=0,
    out_axes=0,
    axis_size=len(arguments[0]),
    variable_axes={'params': 0},
    split_rngs={'params': True, 'dropout': True, 'router': True},
    metadata_params={nn.PARTITION_NAME: 'expert'},
  )
  return apply(expert, *arguments)
