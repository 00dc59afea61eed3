"""The mesh of devices, and the sharding of arrays over it.

A table maps the logical axes of arrays to axes of the mesh. Data, fully
sharded, expert and tensor parallelism are rows of that table.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import OptionError, Options, option, unknown, unknown_text
from moe_jax.errors import InputError

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')
DCN = 'dcn_'  # prefix of an axis' name in the option for the slices it spans


def _size(axis: str, default: int = 1) -> Any:
  return option(
    default,
    f"Number of devices along the mesh axis '{axis}' within a slice, whose "
    'network is fast; -1 takes all devices that the other axes leave.',
    minimum=-1,
  )


def _slices_of(axis: str) -> Any:
  return option(
    1,
    f"Number of slices that the mesh axis '{axis}' spans, over the slower "
    'network between slices; 1 stays within a slice.',
    minimum=1,
  )


@dataclasses.dataclass(frozen=True)
class MeshOptions(Options):
  """Sizes of the axes of the mesh of devices."""

  data: int = _size('data', -1)
  fsdp: int = _size('fsdp')
  expert: int = _size('expert')
  tensor: int = _size('tensor')
  dcn_data: int = _slices_of('data')
  dcn_fsdp: int = _slices_of('fsdp')
  dcn_expert: int = _slices_of('expert')
  dcn_tensor: int = _slices_of('tensor')

  def problems(self):
    for name in MESH_AXES:
      if not getattr(self, name):
        yield f'{name}=0 must be at least 1, or -1'
    open_axes = [name for name in MESH_AXES if getattr(self, name) == -1]
    for name in open_axes[1:]:
      yield f'{name}=-1, and {open_axes[0]}=-1 takes what is left already'

  @classmethod
  def for_experts(cls, num_experts: int, num_devices: int) -> 'MeshOptions':
    """The mesh that splits the experts over as many devices as divide them.

    The axis 'data' has the devices that are left. Experts are split evenly, so
    6 experts on 8 devices make an axis 'expert' of 2.

    Args:
      num_experts: Number of experts of a layer; 0, for a model without experts,
        puts all devices on the axis 'data'.
      num_devices: Number of devices, all in one slice.
    """
    expert = math.gcd(num_experts, num_devices) if num_experts else 1
    return cls(data=num_devices // expert, expert=expert)

  @property
  def changed(self) -> dict[str, int]:
    """The sizes that are not 1, by option."""
    return {
      k: size for k, size in dataclasses.asdict(self).items() if size != 1
    }

  def sizes_on(self, num_devices: int) -> tuple[list[int], list[int]]:
    """The size of each of `MESH_AXES` in a slice, and the slices it spans.

    The two lists are in the order of `MESH_AXES`. The axis of size -1 takes the
    devices that are left.

    Raises:
      ValueError: The product of the sizes is not the number of devices.
    """
    shape = [getattr(self, name) for name in MESH_AXES]
    spans = [getattr(self, DCN + name) for name in MESH_AXES]
    product = math.prod(size for size in (*shape, *spans) if size != -1)
    hint = '; -1 takes what is left of them'
    if -1 in shape:
      shape[shape.index(-1)], hint = max(num_devices // product, 1), ''
    if math.prod((*shape, *spans)) != num_devices:
      raise InputError(
        f'mesh={self.changed}: the sizes given multiply to {product}, which '
        f'does not fit {num_devices} devices{hint}'
      )
    return shape, spans

  def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of these devices, by default all of JAX's.

    `dcn_data=2` makes the axis 'data' span two slices, between which the
    network is slower than within a slice: the axis has 2 * `data` devices,
    those of a slice next to each other. Slices are those of a TPU pod, or the
    processes of a GPU cluster; where all devices are in one slice, they are cut
    into as many slices as the options ask for.

    Raises:
      ValueError: The product of the sizes is not the number of devices or of
        slices; or TPUs are in several slices and no dcn_ size says so.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape, spans = self.sizes_on(len(devices))
    num_slices = len(_slices(devices))
    if math.prod(spans) > 1:
      grid = _grid_over_slices(spans, shape, devices)
    elif devices[0].platform == 'tpu' and num_slices > 1:
      raise InputError(
        f'{len(devices)} TPUs are in {num_slices} slices, and '
        f'mesh={self.changed} spans one: set {DCN}data={num_slices} or more of '
        f'the {DCN} sizes'
      )
    else:
      grid = _grid_in_slice(shape, devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

  def shrunk(self) -> 'MeshOptions':
    """The mesh of one device."""
    return MeshOptions(data=1)


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh of `MeshOptions` with the sizes given; all other sizes are 1."""
  return MeshOptions(**{'data': 1, **sizes}).make(devices)


def _grid_in_slice(shape, devices) -> np.ndarray:
  try:
    # On the torus of a TPU slice, an axis may take one side and a part of
    # another: 8 devices of 4 x 4 x 4.
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  except NotImplementedError as error:
    sizes = dict(zip(MESH_AXES, shape))
    raise InputError(
      f'mesh={sizes} does not fit the torus of {len(devices)} devices: '
      f'{str(error).splitlines()[0]}'
    ) from error


def _grid_over_slices(spans, shape, devices) -> np.ndarray:
  """The array of a mesh's devices where axes of the mesh span several slices.

  Along each axis, devices of the same slice are next to each other. Slices are
  those of `_slices`; if that is one, it is cut into as many as are needed.

  Args:
    spans: The number of slices that each axis of the mesh spans.
    shape: The number of devices of each axis within a slice.
    devices: All devices, prod(spans) * prod(shape).

  Raises:
    ValueError: There are several slices, but not prod(spans); or a slice's
      devices cannot have this shape.
  """
  by_slice = _slices(devices)
  if len(by_slice) == 1:
    by_slice = np.split(np.asarray(devices), math.prod(spans))
  elif len(by_slice) != math.prod(spans):
    raise InputError(
      f'{DCN} sizes {dict(zip(MESH_AXES, spans))} multiply to '
      f'{math.prod(spans)}, and the devices are in {len(by_slice)} slices'
    )
  slice_grids = [_grid_in_slice(shape, list(part)) for part in by_slice]
  # The dimensions [spans..., shape...] are reordered, so that the slices of
  # each axis come right before its devices.
  grid = np.stack(slice_grids).reshape(*spans, *shape)
  n = len(shape)
  grid = grid.transpose(
    [i for pair in zip(range(n), range(n, 2 * n)) for i in pair]
  )
  return grid.reshape([a * b for a, b in zip(spans, shape)])


def _slices(devices) -> list[list]:
  """The devices of each slice: of a TPU slice, or else of a process."""
  slices = collections.defaultdict(list)
  for device in devices:
    # libtpu names no slice where there is only one, even of several hosts; all
    # TPUs are then in slice 0.
    only = 0 if device.platform == 'tpu' else device.process_index
    slices[getattr(device, 'slice_index', only)].append(device)
  return [slices[key] for key in sorted(slices)]


# The sharding table: each logical axis with its mesh axes. It is a tuple, so
# that modules that hold it are hashable.
Rules = tuple[tuple[str, tuple[str, ...]], ...]


def _mesh_axes(dim: str, default: str) -> Any:
  return option(
    default,
    f'Mesh axes, separated by commas, over which {dim} is split; an empty '
    'string keeps it whole on every device.',
  )


@dataclasses.dataclass(frozen=True)
class ShardingOptions(Options):
  """The mesh axes over which each logical axis of an array is split."""

  batch: str = _mesh_axes('the batch of sequences', 'data,fsdp,expert')
  embed: str = _mesh_axes('the width of the model in its parameters', 'fsdp')
  mlp: str = _mesh_axes('the hidden width of feed-forward layers', 'tensor')
  heads: str = _mesh_axes('the dimension of query heads', 'tensor')
  kv_heads: str = _mesh_axes('the dimension of heads of keys and values', '')
  kv: str = _mesh_axes('the width of a head', '')
  latent: str = _mesh_axes('the width of vectors that heads expand from', '')
  vocab: str = _mesh_axes('the vocabulary', 'tensor')
  expert: str = _mesh_axes('the dimension of experts', 'expert')
  expert_mlp: str = _mesh_axes('the hidden width of experts', 'tensor')
  expert_choice: str = _mesh_axes(
    'the dimension of router outputs, one for each expert,', ''
  )
  layers: str = _mesh_axes('the dimension of stacked layers', '')
  positions: str = _mesh_axes('the table of learned positions', '')
  buckets: str = _mesh_axes('the table of relative positions', '')

  def problems(self):
    for logical, axes in dataclasses.asdict(self).items():
      names = _axis_names(axes)
      for name in sorted({*names}):
        if name not in MESH_AXES:
          text = unknown_text('mesh axis', name, MESH_AXES)
          yield f'{logical}={axes!r}: {text}'
        elif names.count(name) > 1:
          yield f'{logical}={axes!r} has the mesh axis {name!r} twice'

  @property
  def rules(self) -> Rules:
    """The sharding table: each logical axis with the names of its mesh axes."""
    axes_by_name = dataclasses.asdict(self).items()
    return tuple((name, _axis_names(axes)) for name, axes in axes_by_name)

  def row_parts(self, mesh: Mesh) -> int:
    """The number of devices of a mesh that the rows of a batch are split over.

    Raises:
      OptionError: No rule names an axis of the mesh that has several devices.
    """
    used_axes = {axis for _, axes in self.rules for axis in axes}
    for axis, size in mesh.shape.items():
      if size > 1 and axis not in used_axes:
        raise OptionError(
          [
            f'mesh.{axis}={size}: no row of sharding names {axis!r}, so that '
            'its devices would do the same work; sharding.batch='
            f'{self.batch!r} can name it'
          ]
        )
    return row_parts(mesh, self.rules)


def spread(x: jax.Array) -> dict[str, int]:
  """Sizes above 1 of the mesh axes over which x can still be split.

  The mesh is that of x's type, which arrays have inside a `jit` of arrays on a
  mesh. Axes that an enclosing `shard_map` has split already are left out.
  """
  mesh = jax.typeof(x).sharding.mesh
  return {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind != AxisType.Manual and mesh.shape[name] > 1
  }


def stated(
  x: jax.Array, *axes: tuple[str, ...], padded: bool = False
) -> jax.Array:
  """x with a sharding constraint: the mesh axes of its leading dimensions.

  Mesh axes of one device are left out. A dimension that its axes do not divide
  stays whole, as do dimensions beyond `axes`; with `padded`, the compiler pads
  such a dimension instead, and masks the padding in all that is computed of it.
  """
  sizes = spread(x)
  if not sizes:
    return x
  spec = []
  for size, names in zip(x.shape, axes):
    names = tuple(name for name in names if name in sizes)
    remainder = size % math.prod(sizes[name] for name in names)
    spec.append(None if remainder and not padded else names or None)
  layout = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
  return jax.lax.with_sharding_constraint(x, layout)


def by_token(table: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """A table [V, M] with V split over mesh axes, and each token's vector whole.

  If the axes do not divide V, the compiler pads V to a multiple. (The stored
  table is unpadded, and has M split over these axes instead; see `sharding`.)
  """
  sizes = spread(table)
  if table.shape[0] % math.prod(sizes.get(name, 1) for name in axes):
    # The compiler turns this step and the next into an all-to-all. Without this
    # step, it would first gather a table that is split over `fsdp`, too, on
    # every device.
    table = stated(table, (), axes)
  return stated(table, axes, padded=True)


def on_each_device(
  f: Callable[..., Any],
  split: tuple[Any, ...],
  whole: tuple[Any, ...] = (),
  whole_specs: tuple[Any, ...] = (),
) -> Any:
  """The result of f(*split, *whole), each device computing its rows of `split`.

  This is for what no compiler can split: kernels, sorts, loops over the load.
  The result has the rows of `split`; if the devices do not divide them, each
  device computes all rows.

  Args:
    f: A pure function.
    split: Trees of arrays with the batch, or its groups, in front.
    whole: Trees of arrays that every device needs.
    whole_specs: A `PartitionSpec` for each tree of `whole`, which may split it.
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


def _axis_names(axes: str) -> tuple[str, ...]:
  return tuple(name.strip() for name in axes.split(',') if name.strip())


def row_parts(mesh: Mesh, rules: Rules) -> int:
  """The number of devices that the rows of a batch are split over."""
  return math.prod(mesh.shape[axis] for axis in dict(rules)['batch'])


def sharding(
  mesh: Mesh,
  rules: Rules,
  axes: Sequence[str | None],
  shape: Sequence[int] | None = None,
  name: str = 'array',
  *,
  uneven: bool = False,
) -> NamedSharding:
  """The sharding of an array whose dimensions have these logical axes.

  A vocabulary whose size its mesh axes do not divide stays whole; these axes
  then split the width of the same array too, if they divide it. With `uneven`,
  every other dimension that its mesh axes do not divide stays whole as well.
  Without `shape`, each dimension is taken to be divided by its mesh axes. In
  errors the array is called `name`.

  Raises:
    ValueError: An axis has no rule, two dimensions map to one mesh axis, or
      another dimension does not divide by its mesh axes.
  """
  if shape is not None and len(shape) != len(axes):
    raise InputError(
      f'{name} has shape {tuple(shape)}, and {len(axes)} logical axes '
      f'{tuple(axes)}'
    )
  spec, used, moved = [], {}, ()
  table: dict[str | None, Sequence[str]] = {**dict(rules)}
  for i, axis in enumerate(axes):
    if axis is not None and axis not in table:
      raise unknown(f'logical axis of {name}', axis, table)
    mesh_axes = tuple(a for a in table.get(axis, ()) if mesh.shape[a] > 1)
    for axis_name in mesh_axes:
      if axis_name in used:
        raise InputError(
          f'{name}: sharding maps {used[axis_name]!r} and {axis!r} to mesh '
          f'axis {axis_name!r}'
        )
      used[axis_name] = axis
    num_devices = math.prod(mesh.shape[axis_name] for axis_name in mesh_axes)
    if shape is not None and shape[i] % num_devices:
      if axis == 'vocab':
        moved = mesh_axes
      elif not uneven:
        raise InputError(
          f'{name}: {axis}={shape[i]} does not divide by {num_devices} devices '
          f'of mesh axes {mesh_axes}; choose their sizes so that it does, or '
          f"keep it whole on every device with sharding.{axis}=''"
        )
      mesh_axes = ()
    spec.append(mesh_axes or None)
  if shape is not None and moved and 'embed' in axes:
    i = axes.index('embed')
    mesh_axes = (*moved, *(spec[i] or ()))
    if shape[i] % math.prod(mesh.shape[a] for a in mesh_axes) == 0:
      spec[i] = mesh_axes
  return NamedSharding(mesh, PartitionSpec(*spec))


def tree_shardings(mesh: Mesh, rules: Rules, axes, shapes, uneven=False):
  """The shardings of a tree of parameters.

  Args:
    mesh: The mesh of devices.
    rules: The sharding table.
    axes: A tree like the parameters, with a tuple of logical axes for each.
    shapes: A tree like the parameters, of anything with a `shape`.
    uneven: Whether a dimension that its mesh axes do not divide stays whole,
      instead of being refused.
  """

  def leaf_sharding(path, shape, names):
    name = path_name(path)
    return sharding(mesh, rules, names, shape.shape, name, uneven=uneven)

  # `shapes` is the first tree, so that each tuple of names is passed whole.
  return jax.tree_util.tree_map_with_path(leaf_sharding, shapes, axes)


def path_name(path) -> str:
  """The name of a parameter's path: 'layers/layer_1/moe/experts/w_in'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')
