"""How parameters start, and the logical axis names they carry."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from flax import linen as nn

from moe_jax.config import unknown

INITS = ('fan_in', 'gpt2')


@dataclasses.dataclass(frozen=True)
class Init:
  """The initialisation of every kernel and embedding of a model.

  Attributes:
    kind: 'fan_in' is a truncated normal of variance scale / fan_in (Switch,
      arXiv:2101.03961 section 2.4, whose scale is 0.1). 'gpt2' is a normal of
      std 0.02, and 0.02 / sqrt(2 L) where a layer writes to the residual.
    scale: The scale of 'fan_in'.
    embedding_std: Standard deviation of token and position embeddings.
    num_layers: L, for 'gpt2'.
  """

  kind: str = 'fan_in'
  scale: float = 1.0
  embedding_std: float = 0.02
  num_layers: int = 1

  def __post_init__(self):
    if self.kind not in INITS:
      raise unknown('init.kind', self.kind, INITS)

  def kernel(
    self,
    axes: Sequence[str | None],
    *,
    in_axis: int | Sequence[int] = -2,
    out_axis: int | Sequence[int] = -1,
    residual: bool = False,
    shrink: float = 1.0,
  ):
    """The initialiser of a kernel; axes named 'expert' are not fan-in.

    Args:
      axes: Logical axis names, one a dimension; None: it has none.
      in_axis: The contracted dimensions.
      out_axis: The dimensions they are contracted into.
      residual: Whether the product is added to the residual stream.
      shrink: What the variance of 'fan_in' is divided by.
    """
    if self.kind == 'gpt2':
      std = 0.02 / math.sqrt(2 * self.num_layers) if residual else 0.02
      init = nn.initializers.normal(std)
    else:
      batch_axis = [i for i, name in enumerate(axes) if name == 'expert']
      init = nn.initializers.variance_scaling(
        self.scale / shrink,
        'fan_in',
        'truncated_normal',
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
      )
    return nn.with_logical_partitioning(init, tuple(axes))

  def embedding(self, axes: Sequence[str]):
    """The initialiser of a table of embeddings."""
    init = nn.initializers.normal(self.embedding_std)
    return nn.with_logical_partitioning(init, tuple(axes))


def zeros(axes: Sequence[str | None]):
  """Zeros that carry logical axis names."""
  return nn.with_logical_partitioning(nn.initializers.zeros, tuple(axes))


def ones(axes: Sequence[str]):
  """Ones that carry logical axis names."""
  return nn.with_logical_partitioning(nn.initializers.ones, tuple(axes))


def axis_names(abstract_variables) -> dict:
  """The logical axes of every parameter: a tree of tuples, boxes removed."""

  def names(leaf):
    if isinstance(leaf, nn.LogicallyPartitioned):
      return leaf.names
    return (None,) * leaf.ndim

  return jax.tree.map(
    names,
    abstract_variables,
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )
