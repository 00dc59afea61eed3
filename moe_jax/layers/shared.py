"""The settings that all layers of a model share.

The settings are numerics, biases, depth and sharding; every module of a model
is given the same `Shared` object.
"""

import dataclasses
import math
from typing import Any, Self

from flax import linen as nn
from jax.nn.initializers import Initializer

from moe_jax.config import Kinds, Options, choice, option
from moe_jax.partitioning import Rules, ShardingOptions

DTYPES = ('bfloat16', 'float32')
# The sharding table of a layer that is given none.
RULES = ShardingOptions().rules


@dataclasses.dataclass(frozen=True)
class Init(Options):
  """The base of kinds of initialisation, which draw kernels and embeddings."""

  embedding_std: float = option(
    0.02,
    'Standard deviation of the normal distribution from which the embeddings '
    'of tokens and positions are drawn.',
    above=0,
  )

  def kernel(
    self, *, residual: bool, shrink: float, num_layers: int, **axes: Any
  ) -> Initializer:
    """Returns the initialiser of a kernel, a function (key, shape, dtype).

    Args:
      residual: Whether the product is added to the residual stream.
      shrink: The number that the usual variance is divided by.
      num_layers: L, the depth of the model.
      **axes: The dimensions that are contracted (`in_axis`), the dimensions of
        the result (`out_axis`), and the dimensions along which independent
        kernels are stacked (`batch_axis`).
    """
    raise NotImplementedError

  def embedding(self) -> Initializer:
    """Returns the function (key, shape, dtype) -> a table of embeddings."""
    return nn.initializers.normal(self.embedding_std)


@dataclasses.dataclass(frozen=True)
class FanIn(Init):
  """A truncated normal distribution of variance scale / fan-in.

  Source: section 2.4 of arXiv:2101.03961 (Switch), whose scale is 0.1.
  """

  scale: float = option(
    1.0,
    "Variance of a kernel's initial values times its fan-in (0.1 in Switch).",
    above=0,
  )

  def kernel(self, *, residual, shrink, num_layers, **axes):
    """Returns the initialiser; the fan-in of stacked kernels is that of one.

    `shrink` divides the variance, `axes` has the dimensions that
    `Init.kernel` names, and `residual` and `num_layers` are not read.
    """
    return nn.initializers.variance_scaling(
      self.scale / shrink, 'fan_in', 'truncated_normal', **axes
    )


@dataclasses.dataclass(frozen=True)
class Gpt2(Init):
  """A normal distribution of standard deviation 0.02 for any fan-in.

  The deviation is 0.02 / sqrt(2 L) where a layer writes to the residual stream.
  """

  def kernel(self, *, residual, shrink, num_layers, **axes):
    """Returns the initialiser; the root of `shrink` divides the deviation.

    `residual` and `num_layers` are those of `Init.kernel`; `axes` is not read.
    """
    std = 0.02 / math.sqrt(2 * num_layers) if residual else 0.02
    return nn.initializers.normal(std / math.sqrt(shrink))


INITS = Kinds(
  'initialisation', Init, {'fan_in': FanIn, 'gpt2': Gpt2}, inline=True
)


@dataclasses.dataclass(frozen=True)
class Numerics(Options):
  """The types of a model's numbers, and its initialisation."""

  dtype: str = option(
    'float32',
    'Type of the residual stream, of products and of their results. Routers, '
    'norms, the softmax of attention and losses are always float32.',
    choices=DTYPES,
  )
  param_dtype: str = option(
    'float32',
    'Type in which parameters are stored and updated.',
    choices=DTYPES,
  )
  init: Init = choice(
    INITS, 'fan_in', 'Distribution from which kernels and embeddings are drawn.'
  )

  def shrunk(self) -> Self:
    return type(self)(init=self.init)


@dataclasses.dataclass(frozen=True)
class Shared:
  """The settings that every module of a model receives as `shared`.

  Attributes:
    numerics: The types of numbers, and the initialisation of parameters.
    use_bias: Whether the products of attention and feed-forward layers add a
      bias, and layer norms have one.
    num_layers: L, the depth of the model, for initialisations that need it.
    rules: Pairs of a logical axis and its mesh axes, which
      `ShardingOptions.rules` gives.
    num_tasks: The number of tasks that routers by task tell apart.
  """

  numerics: Numerics = Numerics()
  use_bias: bool = False
  num_layers: int = 1
  rules: Rules = RULES
  num_tasks: int = 0

  @property
  def dtype(self) -> str:
    """The type of products and of the residual stream."""
    return self.numerics.dtype

  @property
  def param_dtype(self) -> str:
    """The type of the stored parameters."""
    return self.numerics.param_dtype

  def mesh_axes(self, logical: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis; () where it has no rule."""
    return dict(self.rules).get(logical, ())
