"""The experts: E feed-forward layers, each on its own rows.

This file alone has expert rows multiplied. How rows come to be is
`moe_jax.dispatch`.
"""

from flax import linen as nn

from moe_jax.layers.ffn import FfnConfig, feed_forward
from moe_jax.shapes import Array, Float, Int32


class Experts(nn.Module):
  """E independent `FeedForward` layers, each on its own rows.

  Every expert starts from its own draw, with the fan-in of one expert. With
  E=1 it is the dense layer.

  Attributes:
    config: One expert.
    backend: Of the grouped products, where rows come with group sizes; see
      `kernels.grouped_matmul`.
  """

  config: FfnConfig
  backend: str = 'auto'

  @nn.compact
  def __call__(
    self,
    rows: Float[Array, '*E R M'],
    train: bool = False,
    group_sizes: Int32[Array, ' experts'] | None = None,
  ) -> Float[Array, '*E R M']:
    """Applies the experts; dropout only if `train`.

    Args:
      rows: [E, R, M], R rows of each expert; or [N, M], sorted by expert.
      train: Turns on dropout.
      group_sizes: Of the sorted rows, how many each expert has.
    """
    return feed_forward(
      self, self.config, rows, train, group_sizes, self.backend
    )


def vmapped(
  expert: nn.Module, rows: Float[Array, 'E R M']
) -> Float[Array, 'E R M']:
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
