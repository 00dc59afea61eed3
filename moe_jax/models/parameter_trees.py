"""A model's parameters: drawn from a key, or as shapes, axes and roles."""

import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.devices import check_room
from moe_jax.layers.parameters import axes_of, roles_of
from moe_jax.models.base import Model
from moe_jax.shapes import PRNGKey


class ParameterTrees(NamedTuple):
  """The shapes, axes and roles of parameters, known without their values.

  Each is a tree with the structure of the parameters, without boxes.

  Attributes:
    shapes: The `jax.ShapeDtypeStruct` of each parameter.
    axes: The logical names of each parameter's dimensions, a tuple.
    roles: The `Role` of each parameter: the part of the model that it belongs
      to, and its use there.
  """

  shapes: Any
  axes: Any
  roles: Any


def init_params(model: Model, key: PRNGKey) -> Any:
  """Initial parameters from a key, in boxes that carry axes and roles.

  Raises:
    ValueError: They are larger than the memory of all devices of the kind that
      holds the key.
  """
  init = _initializer(model)
  if not _has_value(key):
    return init(key)['params']
  leaves = jax.tree.leaves(init.eval_shape(key))
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
  (device, *_) = key.devices()
  need = (f'the variables of {type(model).__name__}', size)
  check_room([need], jax.devices(device.platform))
  return init(key)['params']


def abstract_variables(model: Model) -> dict[str, Any]:
  """The shapes of all collections, in boxes, without computing arrays."""
  shapes = _initializer(model).eval_shape(jax.random.key(0))
  return jax.tree.map(lambda leaf: leaf, shapes)  # a copy


def abstract_params(model: Model) -> Any:
  """The shapes of the parameters; see `abstract_variables`."""
  return abstract_variables(model)['params']


def describe(model: Model) -> ParameterTrees:
  """The shapes, logical axes and roles of a model's parameters."""
  boxed = abstract_params(model)
  return ParameterTrees(nn.meta.unbox(boxed), axes_of(boxed), roles_of(boxed))


def _has_value(key: PRNGKey) -> bool:
  """Whether arrays are made now, and not in a program that is traced."""
  try:
    key.devices()
  except jax.errors.ConcretizationTypeError:
    return False
  return True


def _initializer(model: Model) -> Any:
  """The compiled function from a key to a model's variables, in boxes.

  Tracing a model takes seconds, so that equal models share it.
  """
  try:
    return _cached_initializer(cast(Hashable, model))
  except TypeError:  # a user's model may hold what has no hash
    return _cached_initializer.__wrapped__(model)


@functools.lru_cache(maxsize=64)
def _cached_initializer(model: Any):
  return jax.jit(functools.partial(_init, model))


def _init(model, key):
  # No length of a row changes the shapes, and one token is traced fastest.
  return model.init(key, **model.example(jnp.zeros((1, 1), jnp.int32)))
