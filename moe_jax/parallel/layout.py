"""The layout of groups and experts on a mesh, from the sharding table."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from moe_jax.partitioning import Rules, spread
from moe_jax.shapes import Array, Float, Shaped


@dataclasses.dataclass(frozen=True)
class Layout:
  """The mesh axes that split groups, experts and hidden widths.

  Attributes:
    mesh: The mesh that the types of arrays carry.
    sizes: The size of every mesh axis of more than one device.
    groups: The axes of more than one device that split the groups evenly.
    experts: The axes that split the experts.
    hidden: The axes that split the hidden width of each expert.
  """

  mesh: AbstractMesh
  sizes: dict[str, int]
  groups: tuple[str, ...]
  experts: tuple[str, ...]
  hidden: tuple[str, ...]

  @property
  def exchanged(self) -> tuple[str, ...]:
    """The axes that rows travel along: they split both groups and experts."""
    return tuple(name for name in self.experts if name in self.groups)

  @property
  def group_only(self) -> tuple[str, ...]:
    """The axes that split groups and not experts; no rows travel along them."""
    return tuple(name for name in self.groups if name not in self.experts)

  @property
  def expert_only(self) -> tuple[str, ...]:
    """The axes that split experts, not groups; no rows travel along them."""
    return tuple(name for name in self.experts if name not in self.groups)

  def devices(self, axes: tuple[str, ...]) -> int:
    """The number of devices along the mesh axes `axes` together."""
    return math.prod(self.sizes[name] for name in axes)

  def spec(self, *axes: tuple[str, ...]) -> PartitionSpec:
    """The spec of an array; `axes` has the mesh axes of each dimension."""
    return PartitionSpec(*(names or None for names in axes))

  def on_each_device(
    self, function: Callable[..., Any], in_specs: Any, out_specs: Any
  ) -> Callable[..., Any]:
    """The function mapped over the mesh; each device calls it on its own parts.

    The function that is returned takes and returns whole arrays.

    Args:
      function: The function from parts of arrays to parts of its results.
      in_specs: The partition specs of the arguments.
      out_specs: The partition specs of the results.
    """
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )

  def parameter_specs(
    self, axes: Mapping[str, Sequence[str | None]], *leading: tuple[str, ...]
  ) -> dict[str, PartitionSpec]:
    """The partition specs of experts' parameters, by name.

    Args:
      axes: The logical axes of each parameter, 'expert' first.
      *leading: The mesh axes of each dimension in place of 'expert'. Default:
        one dimension, split over the axes that split the experts.
    """
    leading = leading or (self.experts,)
    return {
      name: self.spec(
        *leading, *(self.hidden if a == 'expert_mlp' else () for a in others)
      )
      for name, (_, *others) in axes.items()
    }


def layout_of(
  rules: Rules, x: Float[Array, 'G S M'], *, num_experts: int, hidden: int = 1
) -> Layout | None:
  """The layout of groups x on their mesh; None on one device.

  A dimension whose size its mesh axes do not divide is not split: an odd number
  of groups, as evaluation may have, is then routed and moved on every device.

  Args:
    rules: The sharding table: 'batch' splits the groups.
    x: The groups.
    num_experts: The number E of experts.
    hidden: The hidden width F of an expert; 1 where it is not to be split.
  """
  axes = spread(x)
  if not axes:
    return None
  table = dict(rules)

  def dividing_axes(names, size):
    names = tuple(name for name in names if name in axes)
    remainder = size % math.prod(axes[name] for name in names)
    return () if remainder else names

  experts = dividing_axes(table['expert'], num_experts)
  groups = dividing_axes(table['batch'], x.shape[0])
  used = {*experts, *groups}
  mlp_axes = tuple(name for name in table['expert_mlp'] if name not in used)
  return Layout(
    mesh=jax.typeof(x).sharding.mesh,
    sizes=axes,
    groups=groups,
    experts=experts,
    hidden=dividing_axes(mlp_axes, hidden),
  )


def own_blocks(
  layout: Layout, x: Shaped[Array, 'E ...']
) -> Shaped[Array, 'X J ...']:
  """The part of x for the experts of each device that rows travel to.

  The function is called under `shard_map`. `[E, ...]` becomes `[X, J, ...]`, J
  experts on each of X devices that exchange rows. Along mesh axes that split
  experts, but along which no rows travel, only this device's part is left.
  """
  sizes = [layout.sizes[name] for name in layout.experts]
  row_shape = x.shape[1:]
  x = x.reshape(*sizes, -1, *row_shape)
  J = x.shape[len(sizes)]
  for i, name in reversed(list(enumerate(layout.experts))):
    if name not in layout.exchanged:
      index = jax.lax.axis_index(name)
      x = jax.lax.dynamic_index_in_dim(x, index, i, keepdims=False)
  return x.reshape(layout.devices(layout.exchanged), J, *row_shape)
