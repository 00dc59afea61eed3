"""Rules that choose which experts are shadowed, by name.

Algorithm 1 of FasterMoE (`shadowing.py`) is one; the rule of FastMoE's code,
which was published with the paper and decides otherwise, is the other.
"""

import functools
import types
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.shadowing import (
  Choice,
  Speeds,
  by_popularity,
  choose,
  choose_in_step,
  rows_of,
)
from moe_jax.shapes import Array, Int


def _fastmoe_prefixes(
  counts: Any,
  sizes: Sizes,
  speeds: Speeds,
  most: int,
  overcounts: bool,
  xp: ModuleType,
) -> tuple[Any, Any, Any]:
  """Experts by popularity, seconds with none to R of them shadowed, and r."""
  _, totals, experts = by_popularity(counts, most, xp)
  # It never shadows the last expert, which has no next one.
  numbers = xp.arange(min(most, len(totals) - 1) + 1)
  largest = -xp.sort(-totals)[: len(numbers)]
  flops = sizes.row_flops * (sizes.bytes_per_element if overcounts else 1)
  row_seconds = 3 * flops / speeds.flops + 4 * sizes.M / speeds.elements
  send_seconds = sizes.expert_rows / speeds.elements
  seconds = row_seconds * largest + send_seconds * numbers
  return experts, seconds, xp.cumprod(seconds[1:] < seconds[:-1]).sum()


def choose_fastmoe(
  counts: Int[np.ndarray, 'E W'],
  sizes: Sizes,
  speeds: Speeds,
  *,
  most: int | None = None,
  overcounts: bool = False,
) -> Choice:
  """The rule of FastMoE's code, which is not Algorithm 1 of its paper.

  It takes experts in the same order, as long as each pays, but by other
  seconds (`fmoe/fastermoe/shadow_policy.py`). The rows of the slowest device
  are those of the most popular expert that is not shadowed. The exchange of
  rows stays in the sum, and each shadowed expert adds one transfer of its
  parameters, not two.

  Args:
    counts: The number of rows of each device that choose each expert.
    sizes: The sizes of the experts.
    speeds: The speeds of the devices.
    most: Largest number of shadowed experts; None for no bound. One expert
      always stays.
    overcounts: Whether FLOPs are multiplied by the bytes of an element, as in
      the prototype of the code.

  Returns:
    The choice, whose seconds are those that the rule compares.

  Raises:
    ValueError: As `choose`.
  """
  counts = np.asarray(counts)
  most = len(counts) if most is None else most
  experts, seconds, number = _fastmoe_prefixes(
    counts, sizes, speeds, most, overcounts, np
  )
  chosen = tuple(experts[: int(number)].tolist())
  return Choice(
    chosen,
    rows_of(counts, chosen),
    float(seconds[int(number)]),
    float(seconds[0]),
  )


def choose_fastmoe_in_step(
  counts: Int[Array, 'E W'],
  sizes: Sizes,
  speeds: Speeds,
  *,
  most: int,
  overcounts: bool = False,
) -> Int[Array, ' R']:
  """The experts that `choose_fastmoe` shadows, inside a compiled step.

  Args and returned numbers are as in `choose_in_step`, and `overcounts` as in
  `choose_fastmoe`.

  Raises:
    ValueError: As `choose`.
  """
  experts, _, number = _fastmoe_prefixes(
    counts, sizes, speeds, most, overcounts, jnp
  )
  return jnp.where(jnp.arange(most) < number, experts, counts.shape[0])


class Rule(NamedTuple):
  """A rule that chooses which experts are shadowed.

  Attributes:
    choose: The rule on counts of numpy, as `choose`.
    in_step: The rule inside a compiled step, as `choose_in_step`.
  """

  choose: Callable[..., Choice]
  in_step: Callable[..., Int[Array, ' R']]


RULES = types.MappingProxyType(
  {
    'algorithm_1': Rule(choose, choose_in_step),
    'fastmoe': Rule(choose_fastmoe, choose_fastmoe_in_step),
    'fastmoe_prototype': Rule(
      functools.partial(choose_fastmoe, overcounts=True),
      functools.partial(choose_fastmoe_in_step, overcounts=True),
    ),
  }
)
