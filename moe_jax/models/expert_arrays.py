"""The arrays of single sparse layers, and models with some arrays replaced.

Merging, pruning and exports read a model layer by layer and build a model with
fewer experts, or with copies of experts. Arrays are told apart by their roles
and logical axes, never by their names.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.parameters import Names
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.layers.routers.steps import AXES
from moe_jax.layers.shared import Shared
from moe_jax.models import trees
from moe_jax.models.base import Model, ModelOptions
from moe_jax.models.description import Path
from moe_jax.models.layer_options import LayerOptions
from moe_jax.models.trees import describe, flatten, unflatten

EXPERT, COLUMN = 'expert', AXES[-1]
Arrays = dict[Path, Any]


class SparseLayer(NamedTuple):
  """The arrays of one sparse layer, by their paths in the layer.

  Attributes:
    number: The index of the layer in the model, where an encoder's layers come
      first.
    in_stack: The index of the layer in its encoder or decoder.
    moe: The options of its mixture of experts.
    shared: The settings that all layers of the model share.
    experts: The parameters of experts, with the experts in front: [E, ...].
    columns: The parameters and the state of the router that have an axis for
      the experts that the router chooses from, such as its kernel.
    axes: The logical axes of the arrays in `experts` and `columns`.
  """

  number: int
  in_stack: int
  moe: MoeOptions
  shared: Shared
  experts: Arrays
  columns: Arrays
  axes: Mapping[Path, Names]


def sparse_layers(
  model: Model, variables: Mapping[str, Any]
) -> dict[int, SparseLayer]:
  """The sparse layers of a model of blocks, by index.

  Raises:
    ValueError: The model has no blocks, or no sparse layer.
  """
  stacks = model.stacks
  if not stacks.blocks or not stacks.sparse_layers:
    raise InputError(
      f'{type(model).__name__} has no sparse blocks: only experts of models of '
      'blocks are merged, pruned or copied'
    )
  places = [
    (i, stack.block.shared)
    for stack in stacks.blocks
    for i in range(len(stack.sparse))
  ]
  axes, roles = {}, {}
  descriptions = describe(model)
  all_roles = flatten(descriptions.roles)
  for path, names in flatten(descriptions.axes).items():
    if (place := stacks.place_of(path)) is not None:
      axes[place.name] = names[1:]  # without the axis of layers
      roles[place.name] = all_roles[path].role
  layers, (params, states) = {}, _layers(model, variables)
  for number in stacks.sparse_layers:
    flat, state = map(flatten, (params[number], states[number]))
    in_stack, shared = places[number]
    layers[number] = SparseLayer(
      number,
      in_stack,
      stacks.moe_of(number),
      shared,
      {p: x for p, x in flat.items() if roles[p] == EXPERT},
      {p: x for p, x in flat.items() if COLUMN in axes[p]} | state,
      {p: axes[p] for p in flat} | {p: (COLUMN,) for p in state},
    )
  return layers


@functools.partial(jax.jit, static_argnames='model')
def _layers(
  model: Model, variables: Mapping[str, Any]
) -> list[tuple[Any, ...]]:
  """A tuple of the layers' parameters, and a tuple of their router states.

  One program slices all stacked arrays. A layer without router state has {}.
  """
  return [
    model.stacks.layer_trees(variables.get(name, {}))
    for name in ('params', ROUTER_STATE)
  ]


@functools.partial(jax.jit, static_argnames=('model', 'new'))
def assembled(
  model: Model,
  variables: Mapping[str, Any],
  new: Model,
  changes: Mapping[int, Arrays],
) -> dict[str, Any]:
  """The variables of a new model that has other arrays in some layers.

  Args:
    model: The model that the variables belong to.
    variables: The parameters, and the state of routers if they keep one.
    new: The new model, whose layers may be stacked in other loops.
    changes: The new arrays, by the index of the layer and the path in the
      layer; all other arrays keep their bits.

  Raises:
    ValueError: An array has not the shape of the new model's variable.
  """
  shapes = {'params': describe(new).shapes}
  if state_shapes := trees.abstract_router_state(new):
    shapes[ROUTER_STATE] = state_shapes
  collections = {}
  for name, tree in shapes.items():
    old_arrays = flatten(variables[name])
    layers = [*map(flatten, model.stacks.layer_trees(variables[name]))]
    arrays = {}
    for path, leaf in flatten(tree).items():
      if (place := new.stacks.place_of(path)) is None:
        arrays[path] = old_arrays[path]
        continue
      rows = []
      for number in place.numbers:
        own = changes.get(number, {})
        array = own.get(place.name, layers[number].get(place.name))
        if array is None or array.shape != leaf.shape[1:]:
          raise InputError(
            f'{"/".join(place.name)} of layer {number} has shape '
            f'{getattr(array, "shape", None)}, not {leaf.shape[1:]}'
          )
        rows.append(array)
      arrays[path] = jnp.stack(rows).astype(leaf.dtype)
    collections[name] = unflatten(arrays)
  return collections


def with_moes(
  options: ModelOptions, change: Callable[[int, LayerOptions], MoeOptions]
) -> ModelOptions:
  """The options of a model of blocks with other mixtures of experts.

  Args:
    options: The options.
    change: The function change(first, half) that returns the mixture of an
      encoder or decoder, from the index of its first layer in the model and the
      options of its layers.
  """
  halves, first = [], 0
  for half in options.halves:
    moe = change(first, half)
    halves.append(dataclasses.replace(half, moe=moe))
    first += half.num_layers
  return options.with_halves(*halves)


def has_merged(model: Model) -> bool:
  """Whether some router has several columns that lead to one merged expert."""
  return any(moe.retained.rows for moe in model.stacks.mixtures)


def with_copies(
  options: ModelOptions, variables: Mapping[str, Any]
) -> tuple[ModelOptions, dict[str, Any]]:
  """The same model with a merged expert copied for each of its router columns.

  The result has as many experts as router columns, and no merged expert, as an
  export to transformers needs it.
  """

  def without_rows(first: int, half: LayerOptions) -> MoeOptions:
    del first
    retained = Retained(half.moe.retained.experts)
    return dataclasses.replace(half.moe, retained=retained)

  model, new = options.build(), with_moes(options, without_rows)
  changes = {}
  for number, layer in sparse_layers(model, variables).items():
    if row := layer.moe.retained.rows.get(layer.in_stack):
      index = np.array(row)
      changes[number] = {p: x[index] for p, x in layer.experts.items()}
  return new, assembled(model, variables, new.build(), changes)
