"""A model's variables as trees: parameters, and the state of routers.

Parameters are drawn from a key, or described by shapes, axes and roles alone.
The collection `router_state` has the variables of routers that no gradient
updates: `apply` reads them; a train step updates them from the loads (tokens
per expert) of the whole batch.
"""

import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from moe_jax.devices import check_room
from moe_jax.layers.parameters import axes_of, roles_of
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models.base import Model
from moe_jax.models.description import Path, Stacks, subtree
from moe_jax.shapes import Array, Float32, Leaf, PRNGKey


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
  """The leaves of a tree of dicts, such as arrays, axes or roles, by path."""
  return traverse_util.flatten_dict(tree)


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
  """The tree of dicts with these leaves, the inverse of `flatten`."""
  return traverse_util.unflatten_dict(leaves)


class ParameterTrees(NamedTuple):
  """The shapes, axes and roles of parameters, known without their values.

  Each attribute is a tree with the structure of the parameters, without boxes.

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
    ValueError: The variables are larger than the memory of all devices of the
      platform that holds the key.
  """
  init = _initializer(model)
  try:
    (device, *_) = key.devices()
  except jax.errors.ConcretizationTypeError:  # in a program that is traced
    return init(key)['params']
  leaves = jax.tree.leaves(init.eval_shape(key))
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
  need = (f'the variables of {type(model).__name__}', size)
  check_room([need], jax.devices(device.platform))
  return init(key)['params']


def abstract_variables(model: Model) -> dict[str, Any]:
  """The shapes of variables, by collection, in boxes; no array is computed."""
  shapes = _initializer(model).eval_shape(jax.random.key(0))
  return jax.tree.map(lambda leaf: leaf, shapes)  # a copy


def abstract_params(model: Model) -> Any:
  """The shapes of the parameters, in flax's boxes; no array is computed."""
  return abstract_variables(model)['params']


def describe(model: Model) -> ParameterTrees:
  """The shapes, logical axes and roles of a model's parameters."""
  boxed = abstract_params(model)
  return ParameterTrees(nn.meta.unbox(boxed), axes_of(boxed), roles_of(boxed))


def _initializer(model: Model) -> Any:
  """The compiled function from a key to a model's variables, in boxes.

  Equal models share the function, as tracing a model takes seconds.
  """
  try:
    return _cached_initializer(cast(Hashable, model))
  except TypeError:  # a user's model may hold what has no hash
    return _cached_initializer.__wrapped__(model)


@functools.lru_cache(maxsize=64)
def _cached_initializer(model: Any):
  return jax.jit(functools.partial(_init, model))


def _init(model, key):
  # The shapes do not depend on a row's length; one token is traced fastest.
  batch = {
    name: jnp.zeros(x.shape, x.dtype)
    for name, x in model.batch_shapes(1, 1, 1).items()
  }
  return model.init(key, **model.inputs(batch))


def variables(params: Any, router_state: Any) -> dict[str, Any]:
  """The variables that `apply` takes; an empty `router_state` is left out."""
  collections = {ROUTER_STATE: router_state} if router_state else {}
  return {'params': params, **collections}


def abstract_router_state(model: Model) -> dict[str, Any]:
  """The shapes of the collection `router_state`; {} for a model without it."""
  if not model.stacks.keeps_router_state:
    return {}
  return nn.meta.unbox(abstract_variables(model).get(ROUTER_STATE, {}))


def init_router_state(model: Model) -> dict[str, Any]:
  """The collection `router_state` before the first step: zeros."""
  shapes = abstract_router_state(model)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def move_router_state(
  stacks: Stacks,
  router_state: dict[str, Any],
  load: Float32[Array, 'L E'],
  rate: Leaf | None = None,
) -> dict[str, Any]:
  """The collection `router_state` after an optimizer step.

  Args:
    stacks: The description of the model.
    router_state: The collection before the step.
    load: The number of tokens of the whole batch that chose each expert in each
      layer, before drops.
    rate: The amount by which a step changes a balancing bias; None: the rate in
      the routers' options.
  """

  def move(router, state, rows):
    """The state of the router after the step, in the nested dicts of a layer.

    The router's own variables are the outermost dict that holds an array;
    `rows` are the loads of its layer, [E], or, where states of several layers
    are stacked, of these layers, [L, E].
    """
    if any(not isinstance(value, Mapping) for value in state.values()):
      return router.move_state(state, rows, rate)
    return {name: move(router, part, rows) for name, part in state.items()}

  # The index of each layer by its path; a list for layers that are stacked.
  numbers: dict[Path, Any] = {}
  for number, layer in enumerate(stacks.layers):
    if layer.index is None:
      numbers[layer.path] = number
    else:
      numbers[layer.path] = [*numbers.get(layer.path, ()), number]
  moved = flatten(router_state)
  for path, layers in numbers.items():
    if state := subtree(router_state, path):
      router = stacks.moe_of(int(np.ravel(layers)[0])).router
      new_state = move(router, state, load[jnp.array(layers)])
      moved |= {(*path, *p): leaf for p, leaf in flatten(new_state).items()}
  return unflatten(moved)
