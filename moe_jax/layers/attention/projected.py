"""Queries, keys and values behind their projections: norms and clipping.

Keys and values of an encoder's output, which a decoder's cache keeps, are
computed here too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.layers.attention.attention_kind import AttentionBase
from moe_jax.layers.shared import Shared
from moe_jax.shapes import Array, Float


def rms_normed(
  x: Float[Array, '*B'], scale: Float[Array, '*n'], epsilon: float
) -> Float[Array, '*B']:
  """x over its root mean square times `scale`; statistics are float32.

  The mean is over as many of the last dimensions as the scale has, on all
  devices that they are split over.
  """
  axes = tuple(range(-scale.ndim, 0))
  x32 = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
  scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
  return (x32 * jax.lax.rsqrt(mean + epsilon) * scale).astype(x.dtype)


def project_memory(
  shared: Shared,
  options: AttentionBase,
  p: Mapping[str, Any],
  memory: Float[Array, 'B S M'],
) -> tuple[Float[Array, 'R B N S D'], Float[Array, 'R B N S D']]:
  """Keys and values of R cross-attention layers, for a decoder's cache.

  Args:
    shared: The settings that all layers of the model share.
    options: The options of attention, with no size left at 0.
    p: The parameters of the layers, each [R, ...].
    memory: The encoder's output.
  """

  def project(name):
    w = p[f'w_{name}'].astype(shared.dtype)
    y = jnp.einsum('BSM,RMND->RBNSD', memory.astype(shared.dtype), w)
    if (b := p.get(f'b_{name}')) is not None:
      y = y + b.astype(shared.dtype)[:, None, :, None]
    return y

  def finish(y, scale):
    return options.finished(y.swapaxes(-2, -3), scale).swapaxes(-2, -3)

  key = jax.vmap(finish)(project('key'), p.get('key_norm'))
  return key, jax.vmap(lambda y: finish(y, None))(project('value'))
