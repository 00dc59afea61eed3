"""The sizes of a sparse layer that its router knows, and tied columns."""

import dataclasses
import functools
from typing import overload

import jax.numpy as jnp
import numpy as np

from moe_jax.routing.capacity import Capacity, PerToken
from moe_jax.shapes import Array, Int, Int32

# The entry of a column that leads to no expert and is never chosen.
MASKED = -1


@dataclasses.dataclass(frozen=True)
class TiedColumns:
  """The expert behind each column of routers with fewer experts than columns.

  Merging ties the columns of merged experts to one expert; pruning masks the
  column of an expert that is gone, after the softmax.

  Attributes:
    rows: The number of each layer, and its E entries: the expert that each
      column leads to, or `MASKED`. The layers have equally many experts.
  """

  rows: tuple[tuple[int, tuple[int, ...]], ...]

  @functools.cached_property
  def num_experts(self) -> int:
    """E', the number of experts in each of the layers."""
    return max(max(row) for _, row in self.rows) + 1

  @functools.cached_property
  def most_columns(self) -> int:
    """The most columns that lead to the same expert."""
    return max(row.count(e) for _, row in self.rows for e in row if e >= 0)

  @property
  def masks(self) -> bool:
    """Whether some column is never chosen."""
    return any(MASKED in row for _, row in self.rows)

  def at(self, layer: int | Int[Array, '']) -> Int32[Array, ' E']:
    """The entries of one layer, whose number may be traced by a loop."""
    numbers, rows = zip(*self.rows)
    if len(rows) == 1:
      return jnp.asarray(rows[0], jnp.int32)
    table = np.zeros((max(numbers) + 1, len(rows[0])), np.int32)
    table[list(numbers)] = rows
    return jnp.asarray(table)[layer]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of the layer that a router serves.

  Attributes:
    num_experts: E, the number of experts that a router tells apart: its logits
      for each token, and the length of its loads.
    num_selected: K, the number of experts that a token chooses. Where experts
      choose tokens, it only enters into their capacity.
    capacity: The rule for the number of a group's tokens that an expert serves.
    tied: The experts behind E columns where there are fewer than E; None where
      column e is expert e.
    row_length: T, the number of tokens of a row of the batch, which a group may
      be a part of or have several of; 0: that of a group.
  """

  num_experts: int
  num_selected: int = 1
  capacity: Capacity = PerToken()
  tied: TiedColumns | None = None
  row_length: int = 0

  @property
  def num_retained(self) -> int:
    """E', the number of experts that there are; E unless columns are tied."""
    return self.num_experts if self.tied is None else self.tied.num_experts

  def slots(self, group_size: int) -> int:
    """The slots of a column in a group of that many tokens, a Python int."""
    return self.capacity.per_expert(
      group_size, self.num_experts, self.num_selected
    )

  @overload
  def expert_slots(self, slots: int, group_size: int) -> int: ...

  @overload
  def expert_slots(self, slots: int | None, group_size: int) -> int | None: ...

  def expert_slots(self, slots: int | None, group_size: int) -> int | None:
    """The slots of an expert, which are those of all columns that lead to it.

    All experts have as many as the one with the most columns.

    Args:
      slots: The slots of a column; None for no bound.
      group_size: The number of tokens in a group, each of which chooses K
        columns.
    """
    if slots is None or self.tied is None:
      return slots
    most = self.tied.most_columns
    return min(most * slots, min(most, self.num_selected) * group_size)
