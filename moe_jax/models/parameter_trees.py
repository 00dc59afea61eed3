"""A model's parameters: drawn from a key, or as shapes, axes and roles."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.parameters import axes_of, roles_of
from moe_jax.models.base import Model
from moe_jax.shapes import PRNGKey


class ParameterTrees(NamedTuple):
  """The shapes, axes and roles of parameters, before there are any.

  Each is a tree of the parameters' form, without boxes.

  Attributes:
    shapes: A `jax.ShapeDtypeStruct` each.
    axes: The logical names of its dimensions each, a tuple.
    roles: The `Role` of each: what it is for, and what is done with it.
  """

  shapes: Any
  axes: Any
  roles: Any


def init_params(model: Model, key: PRNGKey, seq_len: int) -> Any:
  """Parameters from a key, in the boxes that carry axes and roles."""
  tokens = jnp.zeros((1, seq_len), jnp.int32)
  return model.init(key, **model.example(tokens))['params']


def abstract_params(model: Model, seq_len: int) -> Any:
  """Shapes of the parameters, in their boxes; nothing is computed."""
  init = functools.partial(init_params, model, seq_len=seq_len)
  return jax.eval_shape(init, jax.random.key(0))


def describe(model: Model, seq_len: int = 1) -> ParameterTrees:
  """Shapes, logical axes and roles, which no length of a row changes."""
  boxed = abstract_params(model, seq_len)
  return ParameterTrees(nn.meta.unbox(boxed), axes_of(boxed), roles_of(boxed))
