"""Sharding of arrays: a table maps logical axes of dimensions to mesh axes.

Data, fully sharded, expert and tensor parallelism are rows of that table.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.device_mesh import MESH_AXES, MeshOptions, make_mesh
from moe_jax.errors import InputError
from moe_jax.option_checks import unknown_text
from moe_jax.options import Options, option, unknown

__all__ = [
  'MESH_AXES',
  'MeshOptions',
  'Rules',
  'ShardingOptions',
  'by_token',
  'make_mesh',
  'make_rules',
  'on_each_device',
  'path_name',
  'row_parts',
  'sharding',
  'spread',
  'stated',
  'tree_shardings',
]

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
    """Every name must be that of a mesh axis."""
    for logical, axes in dataclasses.asdict(self).items():
      for name in _axis_names(axes):
        if name not in MESH_AXES:
          yield f'{logical}={axes!r}: ' + unknown_text(
            'mesh axis', name, MESH_AXES
          )
      for name in _repeated(_axis_names(axes)):
        yield f'{logical}={axes!r} has the mesh axis {name!r} twice'

  @property
  def rules(self) -> Rules:
    """The sharding table, as modules and `sharding` take it."""
    return make_rules(dataclasses.asdict(self))


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
  it instead, and masks the padding in whatever is computed from it.
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
  """A table [V, M] with its tokens split over mesh axes, and its rows whole.

  Tokens that do not divide are padded to a multiple, here alone: stored tables
  are unpadded, and have their rows split over these axes (`sharding`).
  """
  sizes = spread(table)
  if table.shape[0] % math.prod(sizes.get(name, 1) for name in axes):
    # The compiler makes an all-to-all of this step and the next; of one step
    # from `fsdp` as well, it would gather the table on every device first.
    table = stated(table, (), axes)
  return stated(table, axes, padded=True)


def on_each_device(
  f: Callable[..., Any],
  split: tuple[Any, ...],
  whole: tuple[Any, ...] = (),
  whole_specs: tuple[Any, ...] = (),
) -> Any:
  """f(*split, *whole) where each device computes its own rows of `split`.

  This is for what no compiler can split: kernels, sorts, loops over the load.
  The result has the rows of `split`; if the devices do not divide them, each
  device computes all rows.

  Args:
    f: A pure function.
    split: Trees of arrays with the batch, or its groups, in front.
    whole: Trees of arrays that every device needs.
    whole_specs: Partition specs of `whole`, for those that f takes split.
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


def make_rules(table: Mapping[str, str]) -> Rules:
  """Parses `{'batch': 'data,fsdp', 'kv': ''}` into tuples of mesh axes."""
  rules = {logical: _axis_names(axes) for logical, axes in table.items()}
  for logical, names in rules.items():
    for name in names:
      if name not in MESH_AXES:
        raise unknown(f'mesh axis in sharding.{logical}', name, MESH_AXES)
    for name in _repeated(names):
      raise InputError(
        f'sharding.{logical}={table[logical]!r} has the mesh axis {name!r} '
        'twice'
      )
  return tuple(rules.items())


def _repeated(names: tuple[str, ...]) -> list[str]:
  """The names that come more than once, which splits nothing further."""
  return sorted({name for name in names if names.count(name) > 1})


def _axis_names(axes: str) -> tuple[str, ...]:
  if not isinstance(axes, str):
    raise InputError(
      f"mesh axes {axes!r} must be one text, with commas: 'data,fsdp'"
    )
  return tuple(name.strip() for name in axes.split(',') if name.strip())


def row_parts(mesh: Mesh, rules: Rules) -> int:
  """The number of parts that the rows of a batch are split into."""
  return math.prod(mesh.shape[axis] for axis in dict(rules)['batch'])


def sharding(
  mesh: Mesh,
  rules: Rules,
  axes: Sequence[str | None],
  shape: Sequence[int] | None = None,
  name: str = 'array',
) -> NamedSharding:
  """The sharding of an array whose dimensions have these logical axes.

  A vocabulary that does not divide is whole; its mesh axes split the width of
  the same array too, where that divides.

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
      if axis != 'vocab':
        raise InputError(
          f'{name}: {axis}={shape[i]} does not divide by {num_devices} devices '
          f'of mesh axes {mesh_axes}; choose their sizes so that it does, or '
          f"keep it whole on every device with sharding.{axis}=''"
        )
      moved, mesh_axes = mesh_axes, ()
    spec.append(mesh_axes or None)
  if shape is not None and moved and 'embed' in axes:
    i = axes.index('embed')
    mesh_axes = (*moved, *(spec[i] or ()))
    if shape[i] % math.prod(mesh.shape[a] for a in mesh_axes) == 0:
      spec[i] = mesh_axes
  return NamedSharding(mesh, PartitionSpec(*spec))


def tree_shardings(mesh: Mesh, rules: Rules, axes, shapes):
  """The shardings of a tree of parameters.

  Args:
    mesh: The mesh of devices.
    rules: The sharding table.
    axes: A tree like the parameters, with a tuple of logical axes for each.
    shapes: A tree like the parameters, of anything with a `shape`.
  """

  def leaf_sharding(path, shape, names):
    name = path_name(path)
    return sharding(mesh, rules, names, shape.shape, name)

  # `shapes` leads, so that each tuple of names arrives whole.
  return jax.tree_util.tree_map_with_path(leaf_sharding, shapes, axes)


def path_name(path) -> str:
  """The name of a parameter's path: 'layers/layer_1/moe/experts/w_in'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')
