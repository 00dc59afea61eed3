"""Normalisation by name; statistics in float32 whatever the dtype."""

import dataclasses
import functools

from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.layers.initializers import ones, zeros

NORMS = ('layernorm', 'rmsnorm')


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """How a model normalises.

  Attributes:
    kind: 'rmsnorm' or 'layernorm'.
    epsilon: Added to the variance.
    use_bias: Whether layernorm has a bias.
    use_scale: Whether either has a learned scale; it is one of the
      multiplicative interactions that ST-MoE removes for stability
      (arXiv:2202.08906 section 3.1).
  """

  kind: str = 'rmsnorm'
  epsilon: float = 1e-6
  use_bias: bool = False
  use_scale: bool = True

  def __post_init__(self):
    if self.kind not in NORMS:
      raise unknown('norm', self.kind, NORMS)


def make_norm(config: NormConfig, dtype: str, name: str) -> nn.Module:
  """The module, whose parameters are 'scale' and 'bias' where it has them."""
  make = functools.partial(
    nn.RMSNorm if config.kind == 'rmsnorm' else nn.LayerNorm,
    epsilon=config.epsilon,
    dtype=dtype,
    use_scale=config.use_scale,
    scale_init=ones(('embed',)),
    name=name,
  )
  if config.kind == 'rmsnorm':
    return make()
  return make(use_bias=config.use_bias, bias_init=zeros(('embed',)))
