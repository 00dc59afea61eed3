"""Shardings of an optimizer's state, which follow those of the parameters."""

import itertools

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def like_params(mesh: Mesh, state, params, param_shardings):
  """The shardings of an optimizer's state.

  A leaf is split like the parameter whose path its own path contains, or is
  whole if there is none. Moments have the parameter's shape; Adafactor's
  statistics have some of its dimensions, which are split as in the parameter.
  A dimension that could be either of two dimensions of equal size is whole
  where those are split differently.

  Args:
    mesh: The mesh of devices.
    state: The state, or its shapes.
    params: The parameters, or their shapes.
    param_shardings: A tree like `params` of their shardings.
  """
  shapes_and_specs = {
    tuple(map(str, path)): (leaf.shape, sharding.spec)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(param_shardings),
      strict=True,
    )
  }

  def sharding_of(path, leaf):
    path = tuple(map(str, path))
    for start in range(len(path)):
      for end in range(len(path), start, -1):
        if path[start:end] in shapes_and_specs:
          spec = _spec_of_subset(leaf.shape, *shapes_and_specs[path[start:end]])
          return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(sharding_of, state)


def _spec_of_subset(shape, full_shape, spec) -> PartitionSpec:
  """The spec of an array that has some dimensions of `full_shape`."""
  choices = [
    [spec[i] for i in dims]
    for dims in itertools.combinations(range(len(full_shape)), len(shape))
    if tuple(full_shape[i] for i in dims) == shape
  ]
  if not choices:  # the shapes agree in leading, stacked dimensions alone
    equal_dims = itertools.takewhile(
      lambda pair: pair[0] == pair[1], zip(shape, full_shape)
    )
    return PartitionSpec(*spec[: len(list(equal_dims))])
  return PartitionSpec(
    *(axes[0] if len(set(axes)) == 1 else None for axes in zip(*choices))
  )
