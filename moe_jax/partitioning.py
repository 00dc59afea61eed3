"""Where arrays live: logical axes of their dimensions, split by a table.

Data, fully sharded, expert and tensor parallelism are rows of that table.
Not here: the mesh itself (`device_mesh.py`), and the exchange of tokens between
the devices of experts (`parallel/exchange.py`).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.device_mesh import MESH_AXES, MeshOptions, make_mesh
from moe_jax.options import Options, option, unknown, unknown_text

__all__ = [
  'MESH_AXES',
  'MeshOptions',
  'Rules',
  'ShardingOptions',
  'like_params',
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

# The sharding table: each logical axis with its mesh axes. It is hashable, as
# modules that hold it have to be.
Rules = tuple[tuple[str, tuple[str, ...]], ...]


def _mesh_axes(what: str, default: str) -> Any:
  return option(
    default,
    f'Mesh axes, separated by commas, over which {what} is split; with an '
    'empty string it stays whole.',
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
    """Each name is that of a mesh axis."""
    for logical, axes in dataclasses.asdict(self).items():
      for name in _named(axes):
        if name not in MESH_AXES:
          yield f'{logical}={axes!r}: ' + unknown_text(
            'mesh axis', name, MESH_AXES
          )

  @property
  def rules(self) -> Rules:
    """The table that modules and shardings are made from."""
    return make_rules(dataclasses.asdict(self))


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


def make_rules(table: Mapping[str, str]) -> Rules:
  """Parses `{'batch': 'data,fsdp', 'kv': ''}` into tuples of mesh axes."""
  rules = {logical: _named(axes) for logical, axes in table.items()}
  for logical, names in rules.items():
    for name in names:
      if name not in MESH_AXES:
        raise unknown(f'mesh axis in sharding.{logical}', name, MESH_AXES)
  return tuple(rules.items())


def _named(axes: str) -> tuple[str, ...]:
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

  Raises:
    ValueError: An axis has no rule, two dimensions map to one mesh axis, or
      a dimension does not divide by its mesh axes.
  """
  spec, used, table = [], {}, dict(rules)
  for i, axis in enumerate(axes):
    if axis is not None and axis not in table:
      raise unknown(f'logical axis of {name}', axis, table)
    places = tuple(
      place for place in table.get(axis, ()) if mesh.shape[place] > 1
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
