"""Where arrays live: a mesh from the config, logical axes from a table.

Data, fully sharded, expert and tensor parallelism are rows of that table.
Not here: the exchange of tokens between experts' devices.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import Section, unknown

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')
Rules = Mapping[str, tuple[str, ...]]


def make_mesh(
  sizes: Section, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh of `MESH_AXES`; one size may be -1, which takes what is left.

  Raises:
    ValueError: An axis is unknown, a size is neither positive nor -1, two
      are -1, or their product is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  for name in sizes:
    if name not in MESH_AXES:
      raise unknown('mesh axis', name, MESH_AXES)
  shape = [sizes.get(name, 1) for name in MESH_AXES]
  if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
    raise ValueError(f'mesh={dict(sizes)}: sizes are positive, at most one -1')
  known = math.prod(size for size in shape if size != -1)
  if -1 in shape:
    shape[shape.index(-1)] = len(devices) // known
  if math.prod(shape) != len(devices):
    raise ValueError(
      f'mesh={dict(sizes)}: the sizes given multiply to {known}, which does '
      f'not fit {len(devices)} devices'
    )
  return jax.make_mesh(
    tuple(shape),
    MESH_AXES,
    devices=devices,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def spread(x: jax.Array) -> dict[str, int]:
  """The axes of more than one device of the mesh that x's type carries.

  Inside a `jit` of arrays on a mesh every type does. Axes over which a
  `shard_map` around has split already are not among them.
  """
  mesh = jax.typeof(x).sharding.mesh
  return {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind != AxisType.Manual and mesh.shape[name] > 1
  }


def on_each_device(
  f: Callable[..., Any],
  split: tuple[Any, ...],
  whole: tuple[Any, ...],
  whole_specs: tuple[Any, ...],
) -> Any:
  """f(*split, *whole) on every device's own rows of `split`.

  For what no compiler can split: kernels, sorts, loops over the load. The
  result has the rows of `split`; if they do not divide, each device computes
  all of them.

  Args:
    f: A pure function.
    split: Trees of arrays with the batch, or its groups, in front.
    whole: Trees of arrays that every device needs.
    whole_specs: How they are split nevertheless, inside f.
  """
  x = jax.tree.leaves(split)[0]
  axes = spread(x)
  if not axes:
    return f(*split, *whole)
  rows = tuple(name for name in MESH_AXES[:-1] if name in axes)
  if x.shape[0] % math.prod(axes[name] for name in rows):
    rows = ()
  spec = PartitionSpec(rows or None)
  return jax.shard_map(
    f,
    mesh=jax.typeof(x).sharding.mesh,
    in_specs=(*[spec] * len(split), *whole_specs),
    out_specs=spec,
    check_vma=False,
  )(*split, *whole)


def make_rules(table: Section) -> Rules:
  """Parses `{'batch': 'data,fsdp', 'kv': ''}` into tuples of mesh axes."""
  rules = {}
  for logical, mesh_axes in table.items():
    names = tuple(name.strip() for name in mesh_axes.split(',') if name.strip())
    for name in names:
      if name not in MESH_AXES:
        raise unknown(f'mesh axis in sharding.{logical}', name, MESH_AXES)
    rules[logical] = names
  return rules


def sharding(
  mesh: Mesh,
  rules: Rules,
  axes: Sequence[str | None],
  shape: Sequence[int] | None = None,
  name: str = 'array',
) -> NamedSharding:
  """The sharding of an array whose dimensions have these logical axes.

  Raises:
    ValueError: An axis has no rule, two dimensions map to one mesh axis, or
      a dimension does not divide by its mesh axes.
  """
  spec, used = [], {}
  for i, axis in enumerate(axes):
    if axis is not None and axis not in rules:
      raise unknown(f'logical axis of {name}', axis, rules)
    places = tuple(
      place for place in rules.get(axis, ()) if mesh.shape[place] > 1
    )
    for place in places:
      if place in used:
        raise ValueError(
          f'{name}: sharding maps {used[place]!r} and {axis!r} to mesh axis '
          f'{place!r}'
        )
      used[place] = axis
    parts = math.prod(mesh.shape[place] for place in places)
    if shape is not None and shape[i] % parts:
      raise ValueError(
        f'{name}: {axis}={shape[i]} does not divide by {parts} devices of mesh '
        f'axes {places}'
      )
    spec.append(places or None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def tree_shardings(mesh: Mesh, rules: Rules, axes, shapes):
  """Shardings of a parameter tree; `axes` has a tuple of names a leaf."""

  def one(path, shape, names):
    name = path_name(path)
    return sharding(mesh, rules, names, shape.shape, name)

  # `shapes` leads, so that each tuple of names arrives whole.
  return jax.tree_util.tree_map_with_path(one, shapes, axes)


def like_params(mesh: Mesh, abstract, params, param_shardings):
  """Shardings for optimizer state: as the parameter it mirrors, else whole.

  A leaf mirrors a parameter when its path ends in the parameter's and their
  shapes agree (moments do, factored statistics and counts do not).
  """
  known = {
    tuple(map(str, path)): (leaf.shape, place)
    for (path, leaf), place in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(param_shardings),
      strict=True,
    )
  }
  whole = NamedSharding(mesh, PartitionSpec())

  def one(path, leaf):
    path = tuple(map(str, path))
    for start in range(len(path)):
      shape, place = known.get(path[start:], (None, None))
      if shape == leaf.shape:
        return place
    return whole

  return jax.tree_util.tree_map_with_path(one, abstract)


def path_name(path) -> str:
  """'layers/layer_1/moe/experts/w_in': a parameter's name from its path."""
  return jax.tree_util.keystr(path, simple=True, separator='/')
