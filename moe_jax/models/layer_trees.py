"""The places of a stack's layers in trees of variables.

Layers of one pattern are stacked by period, so the variables of a layer are
slices. Trees of all collections have the same structure.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from moe_jax.models.flat_trees import Path
from moe_jax.models.pattern import layer_name, period_name, segments
from moe_jax.models.stack import StackConfig


class LayerPlace(NamedTuple):
  """The layers that a stacked parameter belongs to.

  Attributes:
    stack: The path of the stack; () in a model with a single stack.
    name: The parameter's path within a layer.
    layers: The numbers of the layers in their stack, in the order in which
      they are stacked.
  """

  stack: Path
  name: Path
  layers: tuple[int, ...]


def layer_trees(c: StackConfig, tree: Mapping[str, Any]) -> list[Any]:
  """Each layer's variables in a stack's tree; {} for a layer that has none."""
  layers = []
  for segment in segments(c.kinds):
    for i in range(segment.repeats):
      if c.stacked:
        period = _slice(tree.get(segment.name, {}), i)
      else:
        period = tree.get(period_name(segment, i), {})
      indices = range(len(segment.pattern))
      layers += [period.get(layer_name(j), {}) for j in indices]
  return layers


def periods_of(c: StackConfig, params: Mapping[str, Any]) -> list[list[Any]]:
  """The parameters of a stack's periods: lists with a tree for each layer.

  The leaves of each tree are [R, ...], for R periods that are stacked.
  """
  trees = []
  for segment in segments(c.kinds):
    if c.stacked:
      periods = [params[segment.name]]
    else:
      names = [period_name(segment, i) for i in range(segment.repeats)]
      periods = [jax.tree.map(lambda x: x[None], params[n]) for n in names]
    indices = range(len(segment.pattern))
    trees += [[period[layer_name(j)] for j in indices] for period in periods]
  return trees


def place_of(c: StackConfig, stack: Path, path: Path) -> LayerPlace | None:
  """The layers of a stacked parameter; None for any other parameter.

  Args:
    c: The stack that may hold the parameter.
    stack: The path of the stack.
    path: The path of the parameter in the model.
  """
  first, n = 0, len(stack)
  for segment in segments(c.kinds):
    if path[: n + 1] == (*stack, segment.name):
      period = len(segment.pattern)
      index = [layer_name(i) for i in range(period)].index(path[n + 1])
      layers = range(first + index, first + segment.num_layers, period)
      return LayerPlace(stack, path[n + 2 :], tuple(layers))
    first += segment.num_layers
  return None


def numbers_of(
  stacks: Iterable[tuple[Path, StackConfig]], layer_place: LayerPlace
) -> tuple[int, ...]:
  """The numbers of a parameter's layers in the model, an encoder's first.

  Args:
    stacks: `Model.stacks`.
    layer_place: The place of the parameter.
  """
  first = 0
  for path, stack in stacks:
    if path == layer_place.stack:
      break
    first += len(stack.sparse)
  return tuple(first + i for i in layer_place.layers)


def map_layers(
  c: StackConfig,
  tree: Mapping[str, Any],
  per_layer: Any,
  f: Callable[[Any, Any], Any],
) -> dict[str, Any]:
  """A stack's tree with f(variables, rows) in place of each layer's variables.

  Args:
    c: A stack whose periods are stacked.
    tree: A collection; layers that have nothing in it are left out.
    per_layer: An array with one row for each layer.
    f: The function; its leaves and rows are [R, ...], for R periods.
  """
  mapped, first = {}, 0
  for segment in segments(c.kinds):
    rows = per_layer[first : first + segment.num_layers]
    rows = rows.reshape(segment.repeats, -1, *rows.shape[1:])
    segment_tree = tree.get(segment.name, {})
    names = [layer_name(i) for i in range(len(segment.pattern))]
    layers = {
      name: f(segment_tree[name], rows[:, i])
      for i, name in enumerate(names)
      if name in segment_tree
    }
    if layers:
      mapped[segment.name] = layers
    first += segment.num_layers
  return mapped


def unstack(
  c: StackConfig,
  tree: Mapping[str, Any],
  take: Callable[[Any, int], Any] = lambda tree, i: _slice(tree, i),
) -> tuple[StackConfig, dict[str, Any]]:
  """The same stack with separate variables for every period.

  Slices of stacked parameters are copies, which take too long for a decoding
  step.

  Args:
    c: The stack.
    tree: The tree of the stack in any collection.
    take: The function take(tree, i) that returns the variables of period i.
  """
  tree = dict(tree)
  for segment in segments(c.kinds):
    stacked = tree.pop(segment.name, None)
    if stacked is None:  # a collection that only sparse layers have
      continue
    for i in range(segment.repeats):
      tree[period_name(segment, i)] = take(stacked, i)
  return dataclasses.replace(c, stacked=False), tree


def _slice(tree: Any, i: int) -> Any:
  return jax.tree.map(lambda leaf: leaf[i], tree)
