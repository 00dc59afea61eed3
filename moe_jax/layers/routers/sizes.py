"""The sizes of a sparse layer that its router knows."""

import dataclasses

from moe_jax.routing.capacity import Capacity, PerToken


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of the layer that a router serves.

  Attributes:
    num_experts: E, the number of experts that a router tells apart: its logits
      for each token, and the length of its loads.
    num_selected: K, the number of experts that a token chooses. Where experts
      choose tokens, it only enters into their capacity.
    capacity: The rule for the number of a group's tokens that an expert serves.
    row_length: T, the number of tokens of a row of the batch, which a group may
      be a part of or have several of; 0: that of a group.
  """

  num_experts: int
  num_selected: int = 1
  capacity: Capacity = PerToken()
  row_length: int = 0

  def slots(self, group_size: int) -> int:
    """The slots of an expert in a group of that many tokens, a Python int."""
    return self.capacity.per_expert(
      group_size, self.num_experts, self.num_selected
    )
