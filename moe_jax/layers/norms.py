"""Normalisation, whose statistics are float32 whatever the model's dtype."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import Kinds, Options, option
from moe_jax.layers import parameters
from moe_jax.layers.shared import Shared
from moe_jax.shapes import Array, Float

_AXES = ('embed',)


@dataclasses.dataclass(frozen=True)
class Norm(Options):
  """The base of kinds of normalisation over the last dimension."""

  epsilon: float = option(
    1e-6,
    'Number added to the variance (or mean square) in a norm before its root '
    'is taken.',
    above=0,
  )
  use_scale: bool = option(
    True,
    'Whether a norm has a learned scale. ST-MoE removes this multiplicative '
    'interaction for stability (arXiv:2202.08906 section 3.1).',
  )

  def module(self, shared: Shared, name: str) -> nn.Module:
    """The linen module `name`, whose parameters have the role 'norm'."""
    raise NotImplementedError

  def _arguments(self, shared: Shared, name: str) -> dict:
    return dict(
      epsilon=self.epsilon,
      dtype=shared.dtype,
      use_scale=self.use_scale,
      scale_init=parameters.scale(_AXES, role='norm'),
      name=name,
    )


@dataclasses.dataclass(frozen=True)
class RmsNorm(Norm):
  """Division by the root mean square (arXiv:1910.07467)."""

  def module(self, shared: Shared, name: str) -> nn.Module:
    """The module; its only parameter is 'scale', if `use_scale`."""
    return nn.RMSNorm(**self._arguments(shared, name))


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
  """Subtraction of the mean, then division by the standard deviation."""

  bias: str = option(
    'model',
    "Whether the norm adds a learned bias: 'model' (where model.use_bias says "
    "so), 'always' (Phi-3.5-MoE, whose other layers have none) or 'never'.",
    choices=('always', 'model', 'never'),
  )

  def module(self, shared: Shared, name: str) -> nn.Module:
    """The module; options decide if it has parameters 'scale' and 'bias'."""
    always = self.bias == 'always'
    return nn.LayerNorm(
      **self._arguments(shared, name),
      use_bias=shared.use_bias if self.bias == 'model' else always,
      bias_init=parameters.bias(_AXES, role='norm'),
    )


NORMS = Kinds(
  'norm', Norm, {'rmsnorm': RmsNorm, 'layernorm': LayerNorm}, inline=True
)


def rms_normed(
  x: Float[Array, '*B'], scale: Float[Array, '*n'], epsilon: float
) -> Float[Array, '*B']:
  """x divided by its root mean square, then times `scale`, in float32.

  The mean of squares is over as many of the last dimensions as the scale has,
  and over all devices that these dimensions are split over; `epsilon` is added
  to it before its root is taken. The result has the type of x.
  """
  axes = tuple(range(-scale.ndim, 0))
  x32 = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
  scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
  return (x32 * jax.lax.rsqrt(mean + epsilon) * scale).astype(x.dtype)
