"""Checks of the sizes that rules of routing take as numbers."""

from moe_jax.errors import InputError
from moe_jax.shape_checks import is_whole


def check_selected(num_selected: int, num_experts: int) -> None:
  """Raises ValueError where K is not in [1, E]."""
  if not 1 <= num_selected <= num_experts:
    raise InputError(
      f'num_selected={num_selected} not in [1, num_experts={num_experts}]'
    )


def check_capacity(capacity: int | None) -> None:
  """Raises ValueError where C is neither None nor an integer of at least 1."""
  if capacity is None or (is_whole(capacity) and capacity >= 1):
    return
  raise InputError(f'capacity={capacity!r} must be at least 1, or None')


def check_slots(capacity: int, group_size: int) -> None:
  """Raises ValueError where C is no integer in [1, S]."""
  if not (is_whole(capacity) and 1 <= capacity <= group_size):
    raise InputError(f'capacity={capacity} not in [1, group_size={group_size}]')
