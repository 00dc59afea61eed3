"""The arrays of single sparse layers, and models that have other arrays there.

Merging, pruning and exports read a model layer by layer and build one with
fewer experts, or with copies. Arrays are told apart by roles and axes, never by
names.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.parameters import Names
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers.contract import RouterOptions
from moe_jax.layers.routers.linear_gate import AXES
from moe_jax.layers.shared import Shared
from moe_jax.models import flat_trees
from moe_jax.models.base import Model
from moe_jax.models.encoder_decoder_options import (
  EncoderDecoderOptions,
  EncoderOptions,
)
from moe_jax.models.flat_trees import Path
from moe_jax.models.model_options import ModelOptions
from moe_jax.models.parameter_trees import describe
from moe_jax.models.router_state import abstract_router_state
from moe_jax.models.text_options import LayerOptions
from moe_jax.shapes import Array

EXPERT, COLUMN = 'expert', AXES[-1]
Arrays = dict[Path, Any]


class SparseLayer(NamedTuple):
  """The arrays of one sparse layer, by their paths in the layer.

  Attributes:
    number: The number of the layer in the model, an encoder's counted first.
    in_stack: The number of the layer in its encoder or decoder.
    moe: The options of its mixture.
    shared: The settings that all layers of the model share.
    experts: The parameters of experts, with the experts in front: [E, ...].
    columns: The parameters of the router that have a column for each expert.
    axes: The logical axes of the parameters of both.
  """

  number: int
  in_stack: int
  moe: MoeOptions
  shared: Shared
  experts: Arrays
  columns: Arrays
  axes: Mapping[Path, Names]

  def selected_columns(self, column_index: np.ndarray) -> Arrays:
    """The router's arrays with only these of its columns, in this order."""
    return {
      path: jnp.take(array, column_index, self.axes[path].index(COLUMN))
      for path, array in self.columns.items()
    }


def sparse_layers(
  model: Model, params: Mapping[str, Any]
) -> dict[int, SparseLayer]:
  """The sparse layers of a model, by number.

  Args:
    model: A model of blocks.
    params: The model's parameters, unboxed.

  Raises:
    ValueError: The model has no blocks, or no sparse layer.
  """
  if not model.stacks or not model.sparse_layers:
    raise InputError(
      f'{type(model).__name__} has no sparse blocks: only experts of models of '
      'blocks are merged, pruned or copied'
    )
  axes, roles = _by_layer_path(model)
  trees = _trees(model, params)
  stack_layers = [
    (i, stack.block.shared)
    for _, stack in model.stacks
    for i in range(len(stack.sparse))
  ]
  layers = {}
  for number in model.sparse_layers:
    flat = flat_trees.flatten(trees[number])
    layer_axes = {path: axes[path] for path in flat}
    in_stack, shared = stack_layers[number]
    layers[number] = SparseLayer(
      number,
      in_stack,
      model.moe_of(number),
      shared,
      {p: x for p, x in flat.items() if roles[p] == EXPERT},
      {p: x for p, x in flat.items() if COLUMN in layer_axes[p]},
      layer_axes,
    )
  return layers


@functools.partial(jax.jit, static_argnames='model')
def _trees(model: Model, params: Mapping[str, Any]) -> tuple[Any, ...]:
  """The layers' parameters, by one program instead of one for each slice."""
  return model.layer_trees(params)


def _by_layer_path(model: Model) -> tuple[dict[Path, Names], dict[Path, str]]:
  """The axes and roles of the parameters of layers, by paths in a layer."""
  trees = describe(model)
  all_axes = flat_trees.flatten(trees.axes)
  all_roles = flat_trees.flatten(trees.roles)
  axes, roles = {}, {}
  for path, names in all_axes.items():
    layer_place = model.place_of(path)
    if layer_place is not None:
      axes[layer_place.name] = names[1:]  # the first is that of layers
      roles[layer_place.name] = all_roles[path].role
  return axes, roles


def assembled(
  model: Model,
  params: Mapping[str, Any],
  new: Model,
  changes: Mapping[int, Arrays],
) -> dict[str, Any]:
  """The parameters of a model that has other arrays in some layers.

  Args:
    model: The model of the parameters.
    params: The model's parameters, unboxed.
    new: The new model, whose layers may be stacked in other loops.
    changes: The new arrays of layers, by number and by path in the layer; all
      others are the same bits as before.

  Raises:
    ValueError: An array has not the shape of the new model's parameter.
  """
  return _assembled(model, params, new, dict(changes))


def assembled_state(
  model: Model,
  state: Mapping[str, Any],
  new: Model,
  mixes: Mapping[int, Float[np.ndarray, 'N E']] | None = None,
) -> dict[str, Any]:
  """The state of routers of a model that has other columns in some layers.

  Args:
    model: The model of the state.
    state: The state of its routers; {} where they keep none.
    new: The new model, whose layers may be stacked in other loops.
    mixes: The weights of old columns in each new one, by the number of the
      layer; routers of other layers have the columns that they had.
  """
  if not state:
    return {}
  layers, changes = model.layer_trees(state), {}
  for number, mix in (mixes or {}).items():
    router = model.moe_of(number).router
    mixed = _mixed(router, layers[number], mix)
    changes[number] = flat_trees.flatten(mixed)
  return _assembled(model, state, new, changes, is_state=True)


def _mixed(
  router: RouterOptions, state: Mapping[str, Any], mix: np.ndarray
) -> dict[str, Any]:
  """Mixes a router's state, the highest level of the tree with arrays."""
  if any(not isinstance(value, Mapping) for value in state.values()):
    return router.mixed_state(dict(state), mix)
  return {name: _mixed(router, subtree, mix) for name, subtree in state.items()}


@functools.partial(jax.jit, static_argnames=('model', 'new', 'is_state'))
def _assembled(
  model: Model,
  collection: Mapping[str, Any],
  new: Model,
  changes: dict[int, Arrays],
  is_state: bool = False,
) -> dict[str, Any]:
  shapes = abstract_router_state(new) if is_state else describe(new).shapes
  old_arrays = flat_trees.flatten(collection)
  layers = [flat_trees.flatten(t) for t in model.layer_trees(collection)]
  first, first_layers = 0, {}
  for path, stack in model.stacks:
    first_layers[path] = first
    first += len(stack.sparse)

  def row(number: int, path: Path, shape: tuple[int, ...]) -> Array:
    array = changes.get(number, {}).get(path, layers[number].get(path))
    if array is None or array.shape != shape:
      raise InputError(
        f'{"/".join(path)} of layer {number} has shape '
        f'{getattr(array, "shape", None)}, not {shape}'
      )
    return array

  arrays = {}
  for path, leaf in flat_trees.flatten(shapes).items():
    layer_place = new.place_of(path)
    if layer_place is None:
      arrays[path] = old_arrays[path]
      continue
    numbers = [first_layers[layer_place.stack] + i for i in layer_place.layers]
    rows = [row(n, layer_place.name, leaf.shape[1:]) for n in numbers]
    arrays[path] = jnp.stack(rows).astype(leaf.dtype)
  return flat_trees.unflatten(arrays)


def with_moes(
  options: ModelOptions, change: Callable[[int, Any], MoeOptions]
) -> ModelOptions:
  """The options of a model of blocks with other mixtures.

  Args:
    options: The options.
    change: The function change(first, half) that returns the mixture of the
      layers of an encoder or decoder, whose first layer has that number.
  """
  if not isinstance(options, EncoderDecoderOptions):
    return _with_moe(options, change(0, options))
  encoder = options.encoder_half()
  moe = change(encoder.num_layers, options)
  decoder = dataclasses.replace(options, encoder=EncoderOptions(), moe=moe)
  return decoder.with_encoder(_with_moe(encoder, change(0, encoder)))


def _with_moe(half: Any, moe: MoeOptions) -> Any:
  return dataclasses.replace(half, moe=moe)


def has_tied(model: Model) -> bool:
  """Whether columns of some router lead to the same expert, or to none."""
  return any(moe is not None and moe.retained.rows for moe in model.moes)


def untied(
  options: ModelOptions, params: Mapping[str, Any]
) -> tuple[ModelOptions, dict[str, Any]]:
  """The same model with a copy of an expert for each column that leads to it.

  Args:
    options: The options of a model, perhaps with tied columns.
    params: The model's parameters, unboxed.

  Raises:
    ValueError: A column is masked, so that it leads to no expert.
  """

  def untied_moe(first: int, half: LayerOptions) -> MoeOptions:
    tied = half.moe.retained.tied
    if tied is not None and tied.masks:
      masked = [first + i for i, row in tied.rows if min(row) < 0]
      raise InputError(
        f'columns of the routers of layers {masked} are masked, and lead to no '
        "expert; pruning with --router=shrunk makes a router's columns fewer"
      )
    retained = Retained(half.moe.retained.experts)
    return dataclasses.replace(half.moe, retained=retained)

  model, new = options.build(), with_moes(options, untied_moe)
  changes = {}
  for number, layer in sparse_layers(model, params).items():
    row = layer.moe.retained.rows.get(layer.in_stack)
    if row is not None:
      changes[number] = {
        path: jnp.take(x, np.array(row), 0) for path, x in layer.experts.items()
      }
  return new, assembled(model, params, new.build(), changes)
