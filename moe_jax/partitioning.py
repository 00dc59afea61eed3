"""Where arrays live: a mesh from the config, logical axes from a table.

Data, fully sharded, expert and tensor parallelism are rows of that table.
Not here: the exchange of tokens between experts' devices.
"""

import collections
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import Section, unknown

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')
DCN = 'dcn_'  # before an axis: how many slices it spans
Rules = Mapping[str, tuple[str, ...]]


def make_mesh(
  sizes: Section, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh of `MESH_AXES`; one size may be -1, which takes what is left.

  `dcn_data=2` makes the axis span two slices, whose network is slower than
  that within one: the axis has 2 * `data` devices, those of a slice next to
  each other. Slices are the devices' own (of a TPU pod, or the processes of a
  GPU cluster); devices of one slice are cut into as many as are asked for.

  Raises:
    ValueError: An axis is unknown, a size is neither positive nor -1, two
      are -1, or their product is not the number of devices or of slices; or
      TPUs are in several slices and no dcn_ size says so.
  """
  devices = jax.devices() if devices is None else list(devices)
  known = (*MESH_AXES, *(DCN + name for name in MESH_AXES))
  for name in sizes:
    if name not in known:
      raise unknown('mesh axis', name, known)
  across = [sizes.get(DCN + name, 1) for name in MESH_AXES]
  if min(across) < 1:
    raise ValueError(f'mesh={dict(sizes)}: {DCN} sizes are positive')
  shape = _filled(sizes, len(devices), math.prod(across))
  if math.prod(across) > 1:
    grid = _across(across, shape, devices)
  elif devices[0].platform == 'tpu' and len(_slices(devices)) > 1:
    raise ValueError(
      f'{len(devices)} TPUs are in {len(_slices(devices))} slices, and mesh='
      f'{dict(sizes)} spans one: set {DCN}data={len(_slices(devices))} or more '
      f'of the {DCN} sizes'
    )
  else:
    grid = _within(shape, devices)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _filled(sizes, count: int, slices: int) -> list[int]:
  """The sizes within a slice, -1 filled in."""
  shape = [sizes.get(name, 1) for name in MESH_AXES]
  if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
    raise ValueError(f'mesh={dict(sizes)}: sizes are positive, at most one -1')
  known = math.prod(size for size in shape if size != -1)
  if -1 in shape:
    shape[shape.index(-1)] = count // slices // known
  if math.prod(shape) * slices != count:
    given = {name: size for name, size in sizes.items() if size != 1}
    hint = '' if -1 in given.values() else '; -1 takes what is left of them'
    raise ValueError(
      f'mesh={given}: the sizes given multiply to {known * slices}, which does '
      f'not fit {count} devices{hint}'
    )
  return shape


def _within(shape, devices) -> np.ndarray:
  try:
    # An axis may be a side of the torus and a part of another: 8 of 4 x 4 x 4.
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  except NotImplementedError as error:
    sizes = dict(zip(MESH_AXES, shape))
    raise ValueError(
      f'mesh={sizes} does not fit the torus of {len(devices)} devices: '
      f'{str(error).splitlines()[0]}'
    ) from error


def _across(across, shape, devices) -> np.ndarray:
  """The devices of a mesh over slices, those of each next to each other."""
  by_slice = _slices(devices)
  if len(by_slice) == 1:
    by_slice = np.split(np.asarray(devices), math.prod(across))
  elif len(by_slice) != math.prod(across):
    raise ValueError(
      f'{DCN} sizes {dict(zip(MESH_AXES, across))} multiply to '
      f'{math.prod(across)}, and the devices are in {len(by_slice)} slices'
    )
  inside = [_within(shape, list(part)) for part in by_slice]
  # [across..., within...] -> each axis' slices before its own devices.
  grid = np.stack(inside).reshape(*across, *shape)
  n = len(shape)
  grid = grid.transpose(
    [i for pair in zip(range(n), range(n, 2 * n)) for i in pair]
  )
  return grid.reshape([a * b for a, b in zip(across, shape)])


def _slices(devices) -> list[list]:
  """The devices by what their network is fast within."""
  found = collections.defaultdict(list)
  for device in devices:
    own = getattr(device, 'slice_index', None)
    found[device.process_index if own is None else own].append(device)
  return [found[key] for key in sorted(found)]


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


def stated(x: jax.Array, *axes: tuple[str, ...]) -> jax.Array:
  """x with the mesh axes of its dimensions stated to the compiler.

  Axes of one device are left out; a dimension that does not divide is whole,
  as are those not named.
  """
  sizes = spread(x)
  if not sizes:
    return x
  spec = []
  for size, names in zip(x.shape, axes):
    names = tuple(name for name in names if name in sizes)
    whole = size % math.prod(sizes[name] for name in names)
    spec.append(None if whole else names or None)
  place = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
  return jax.lax.with_sharding_constraint(x, place)


def on_each_device(
  f: Callable[..., Any],
  split: tuple[Any, ...],
  whole: tuple[Any, ...] = (),
  whole_specs: tuple[Any, ...] = (),
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
  """Shardings for optimizer state: as the parameter it belongs to, else whole.

  A leaf belongs to the parameter whose path is in its own. Moments have its
  shape; Adafactor's statistics some of its dimensions, which are split as they
  are there. Where two dimensions of one size could be meant, and are split
  differently, the leaf's is whole.
  """
  known = {
    tuple(map(str, path)): (leaf.shape, place.spec)
    for (path, leaf), place in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(param_shardings),
      strict=True,
    )
  }

  def one(path, leaf):
    path = tuple(map(str, path))
    for start in range(len(path)):
      for end in range(len(path), start, -1):
        if path[start:end] in known:
          spec = _spec_of_some(leaf.shape, *known[path[start:end]])
          return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(one, abstract)


def _spec_of_some(shape, whole, spec) -> PartitionSpec:
  """The spec of an array with some of another's dimensions, in order."""
  choices = [
    [spec[i] for i in dims]
    for dims in itertools.combinations(range(len(whole)), len(shape))
    if tuple(whole[i] for i in dims) == shape
  ]
  if not choices:  # stacked ones lead
    same = itertools.takewhile(
      lambda pair: pair[0] == pair[1], zip(shape, whole)
    )
    return PartitionSpec(*spec[: len(list(same))])
  return PartitionSpec(
    *(axes[0] if len(set(axes)) == 1 else None for axes in zip(*choices))
  )


def path_name(path) -> str:
  """'layers/layer_1/moe/experts/w_in': a parameter's name from its path."""
  return jax.tree_util.keystr(path, simple=True, separator='/')
