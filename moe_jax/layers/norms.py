"""Normalisation by name; statistics in float32 whatever the dtype."""

import functools

from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.layers.initializers import ones, zeros

NORMS = ('layernorm', 'rmsnorm')


def check_norm(kind: str) -> None:
  """Raises what `make_norm` would for an unknown kind."""
  if kind not in NORMS:
    raise unknown('norm', kind, NORMS)


def make_norm(
  kind: str, *, epsilon: float, use_bias: bool, dtype: str, name: str
) -> nn.Module:
  """'rmsnorm' (scale only) or 'layernorm' (scale, and bias if `use_bias`)."""
  check_norm(kind)
  make = functools.partial(
    nn.RMSNorm if kind == 'rmsnorm' else nn.LayerNorm,
    epsilon=epsilon,
    dtype=dtype,
    scale_init=ones(('embed',)),
    name=name,
  )
  if kind == 'rmsnorm':
    return make()
  return make(use_bias=use_bias, bias_init=zeros(('embed',)))
