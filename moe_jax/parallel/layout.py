"""Where groups and experts are on the mesh at hand, from the sharding table."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from moe_jax.partitioning import Rules, spread
from moe_jax.shapes import Array, Float, Shaped


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where groups and experts are on the mesh at hand.

  Attributes:
    mesh: The mesh that the types of arrays carry.
    sizes: The size of every mesh axis of more than one device.
    groups: The axes of more than one device that split the groups evenly.
    experts: Those that split the experts.
    hidden: Those that split the hidden width of each expert.
  """

  mesh: AbstractMesh
  sizes: dict[str, int]
  groups: tuple[str, ...]
  experts: tuple[str, ...]
  hidden: tuple[str, ...]

  @property
  def exchanged(self) -> tuple[str, ...]:
    """The axes that rows cross: their groups and their experts are split."""
    return tuple(name for name in self.experts if name in self.groups)

  @property
  def kept(self) -> tuple[str, ...]:
    """The axes that still split the rows of an expert."""
    return tuple(name for name in self.groups if name not in self.experts)

  def devices(self, axes: tuple[str, ...]) -> int:
    """How many devices the axes have."""
    return math.prod(self.sizes[name] for name in axes)

  def spec(self, *axes: tuple[str, ...]) -> PartitionSpec:
    """Dimensions split over these axes."""
    return PartitionSpec(*(names or None for names in axes))


def layout(
  rules: Rules,
  x: Float[Array, 'G S M'],
  *,
  num_experts: int,
  hidden: int = 1,
) -> Layout | None:
  """The layout of groups x on their mesh; None on one device.

  What does not divide is not split: an odd number of groups, as evaluation
  may have, is then routed and moved on every device.

  Args:
    rules: The sharding table: 'batch' splits the groups.
    x: The groups.
    num_experts: E.
    hidden: F, where the layout is to split it.
  """
  axes = spread(x)
  if not axes:
    return None
  table = dict(rules)

  def dividing(names, size):
    names = tuple(name for name in names if name in axes)
    whole = size % math.prod(axes[name] for name in names)
    return () if whole else names

  experts = dividing(table['expert'], num_experts)
  groups = dividing(table['batch'], x.shape[0])
  taken = {*experts, *groups}
  splits = tuple(name for name in table['expert_mlp'] if name not in taken)
  return Layout(
    mesh=jax.typeof(x).sharding.mesh,
    sizes=axes,
    groups=groups,
    experts=experts,
    hidden=dividing(splits, hidden),
  )


def own_blocks(
  place: Layout, x: Shaped[Array, 'E ...']
) -> Shaped[Array, 'X J ...']:
  """Under `shard_map`: what is for the experts of each device rows go to.

  `[E, ...]` -> `[X, J, ...]`: J experts on each of X devices. Of the experts'
  axes that rows do not cross, this device's part.
  """
  sizes = [place.sizes[name] for name in place.experts]
  rest = x.shape[1:]
  x = x.reshape(*sizes, -1, *rest)
  J = x.shape[len(sizes)]
  for i, name in reversed(list(enumerate(place.experts))):
    if name not in place.exchanged:
      index = jax.lax.axis_index(name)
      x = jax.lax.dynamic_index_in_dim(x, index, i, keepdims=False)
  return x.reshape(place.devices(place.exchanged), J, *rest)
