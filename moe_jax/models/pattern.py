"""Patterns of sparse layers, and the loops that a stack is compiled to.

A loop's body is compiled once, so compile time follows the number of distinct
layers, not L.
"""

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple

from moe_jax.errors import InputError

# The longest period that a loop's body may have; OpenMoE's is 6.
MAX_PERIOD = 8


def sparse_pattern(
  layers: str, num_layers: int, name: str = 'moe.layers'
) -> tuple[bool, ...]:
  """Whether each of L layers is sparse, read from a string.

  The string is 'all', 'none', 'every N' (layers N-1, 2N-1, ... counted from 0),
  'last N', or the indices themselves: '1,3'.

  Args:
    layers: The string.
    num_layers: L, the number of layers.
    name: The option that the string belongs to, for errors.

  Raises:
    ValueError: The string is none of these, or names a layer not in [0, L).
  """
  numbers = set(sparse_numbers(layers, num_layers, name))
  return tuple(i in numbers for i in range(num_layers))


def sparse_numbers(
  layers: str, num_layers: int, name: str = 'moe.layers'
) -> Collection[int]:
  """The indices of the sparse layers, in a range or a set.

  A range takes no time to make, whatever the number of layers. `layers` is
  'all', 'none', 'every N', 'last N' or indices ('1,3'), and `name` the option
  that it belongs to, for errors. Raises ValueError if `layers` is none of
  these, or names a layer not in [0, num_layers).
  """
  if (L := num_layers) < 1:
    raise InputError(f'num_layers={L} must be at least 1')
  word, _, number = layers.strip().partition(' ')
  if layers in ('all', 'none'):
    return range(L if layers == 'all' else 0)
  if word in ('every', 'last') and number.isdigit() and int(number) > 0:
    n = int(number)
    if n > L:
      raise InputError(f'{name}={layers!r} with num_layers={L}')
    return range(n - 1, L, n) if word == 'every' else range(L - n, L)
  entries = [entry.strip() for entry in layers.split(',')]
  if not all(entry.isdigit() for entry in entries):
    raise InputError(
      f"{name}={layers!r} is none of 'all', 'none', 'every N', 'last N', '1,3'"
    )
  indices = {int(entry) for entry in entries}
  if max(indices) >= L:
    raise InputError(f'{name}={layers!r} not in [0, num_layers={L})')
  return indices


def shrunk_pattern(layers: str, num_layers: int) -> tuple[str, int]:
  """A pattern like `layers` for a small model, and its number of layers.

  The number is at least 2. 'every 6' takes 6 layers and '1,3' takes 4; 'last
  26' of 27 layers becomes 'last 2' of 3, after one dense layer.
  """
  word, _, number = layers.strip().partition(' ')
  if word == 'last':
    num_sparse = min(int(number), 2)
    return f'last {num_sparse}', max(num_sparse + (num_layers > int(number)), 2)
  if word == 'every':
    return layers, max(int(number), 2)
  indices = [int(part) for part in layers.split(',') if part.strip().isdigit()]
  return layers, max(*indices, 1, 1) + 1


class Segment(NamedTuple):
  """Consecutive layers that repeat a pattern.

  Attributes:
    name: The name of the segment's parameters: 'layers', or 'layers_0',
      'layers_1', ... if there are several segments.
    pattern: The kind of each layer of one period.
    repeats: The number of periods.
  """

  name: str
  pattern: tuple[Any, ...]
  repeats: int

  @property
  def num_layers(self) -> int:
    """The number of layers in all periods of the segment."""
    return len(self.pattern) * self.repeats


def segments(kinds: tuple[Hashable, ...]) -> list[Segment]:
  """Cuts the L layers into loops, in order.

  A layer's kind is any value, such as a flag whether the layer is sparse;
  layers of equal kinds can share the body of a loop. If the whole stack has a
  period of up to `MAX_PERIOD` layers, it is one loop. Other stacks ('last 2' of
  24, a first dense layer) are cut from the front: each time the pattern is
  taken that repeats over the most layers, and the shortest if several do.
  """
  period = shortest_period(kinds)
  if period <= MAX_PERIOD:
    return [Segment('layers', kinds[:period], len(kinds) // period)]
  loops, start = [], 0
  while start < len(kinds):
    rest = kinds[start:]
    pattern, repeats = max(
      ((rest[:p], _count_repeats(rest, p)) for p in range(1, MAX_PERIOD + 1)),
      # A pattern that does not repeat is no loop, and covers a single layer.
      key=lambda cut: (
        len(cut[0]) * cut[1] if cut[1] > 1 else min(cut[1], 1),
        -len(cut[0]),
      ),
    )
    loops.append(Segment(f'layers_{len(loops)}', pattern, repeats))
    start += len(pattern) * repeats
  return loops


def layer_name(index: int) -> str:
  """The name of a layer's parameters, by its index in a period of layers."""
  return f'layer_{index}'


def period_name(segment: Segment, period: int) -> str:
  """The name of one period's parameters, where periods are not stacked.

  `period` is the index of the period in the segment.
  """
  return f'{segment.name}_period_{period}'


def shortest_period(kinds: tuple[Hashable, ...]) -> int:
  """The least divisor p of len(kinds) for which kinds[i] == kinds[i % p]."""
  L = len(kinds)
  return next(
    p
    for p in range(1, L + 1)
    if L % p == 0 and p * _count_repeats(kinds, p) == L
  )


def _count_repeats(kinds, p):
  """The number of copies of its first p elements that `kinds` begins with."""
  n = 0
  while kinds[n * p : (n + 1) * p] == kinds[:p] and len(kinds) >= n * p + p:
    n += 1
  return n
