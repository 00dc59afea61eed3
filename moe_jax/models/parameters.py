"""A model's parameters: drawn from a key, or as shapes alone."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.shapes import PRNGKey


def init_params(model: nn.Module, key: PRNGKey, seq_len: int):
  """Parameters from a key, in the boxes that carry their logical axes."""
  tokens = jnp.zeros((1, seq_len), jnp.int32)
  return model.init(key, **model.example(tokens))['params']


def abstract_params(model: nn.Module, seq_len: int):
  """Shapes and logical axes of the parameters; nothing is computed."""
  init = functools.partial(init_params, model, seq_len=seq_len)
  return jax.eval_shape(init, jax.random.key(0))
