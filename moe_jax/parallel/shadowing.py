"""Dynamic shadowing: which experts are worth sending to all devices.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418),
section 4.1. The parameters of a shadowed expert go to every device, whose
tokens for it stay, and its gradients go back to the device that has it. This
pays where an expert has so many tokens that all wait for its device. Counts of
one step decide for the same step.

The seconds of a training step in which nothing is shadowed, Lat_imbl, are those
of the products of the device with the most rows, three times, and of its four
exchanges. With r shadowed experts, Lat_shadow (equation 8), parameters are sent
once and gradients summed once; the exchange of the other experts' rows is left
out, as in the paper.

The algorithm is greedy, and stops at the first expert that does not pay. On 200
draws, of 2 to 8 experts, it is best among all subsets in 70 %, slower by 4.3 %
in the mean and by 41 % at most.

Not here: how long an exchange takes on a network of links (`cost_model.py`),
since all devices have one bandwidth in Algorithm 1; and the rule of the code
that was published with the paper, which is another (`shadowing_rules.py`).
"""

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.parallel.cost_model import Sizes, owners
from moe_jax.shapes import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Speeds:
  """The speeds of equal devices, in the units of Algorithm 1.

  Attributes:
    flops: P, FLOPs per second of a device.
    elements: beta_net, elements per second that a device sends or receives.
  """

  flops: float
  elements: float

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if not value > 0:
        raise InputError(f'{name}={value} a second must be above 0')

  @classmethod
  def of_bytes(
    cls, flops: float, bytes_per_second: float, sizes: Sizes
  ) -> 'Speeds':
    """The speeds of a network whose bandwidth is in bytes per second."""
    return cls(flops, bytes_per_second / sizes.bytes_per_element)


class Choice(NamedTuple):
  """The experts that are shadowed, and the seconds by the cost model.

  Attributes:
    experts: The numbers of the experts, in the order of their choice.
    rows: Number of rows of each device once they are shadowed, [W].
    seconds: Seconds of a training step of the layer's experts with them.
    seconds_before: Seconds of such a step without shadowed experts.
  """

  experts: tuple[int, ...]
  rows: Int[np.ndarray, ' W']
  seconds: float
  seconds_before: float


def rows_of(
  counts: Int[np.ndarray, 'E W'], shadowed: tuple[int, ...] = ()
) -> Int[np.ndarray, ' W']:
  """The number of rows that each device multiplies.

  Args:
    counts: The number of rows of each device that choose each expert.
    shadowed: The experts whose rows stay where they are.
  """
  counts = np.asarray(counts)
  E, W = counts.shape
  stay = np.isin(np.arange(E), shadowed)
  rows = counts[stay].sum(0)
  sent = counts.sum(1)
  np.add.at(rows, owners(E, W)[~stay], sent[~stay])
  return rows


def leaving(
  counts: Int[np.ndarray, 'E W'], shadowed: tuple[int, ...] = ()
) -> int:
  """The number of rows that leave their device."""
  counts = np.asarray(counts)
  E, W = counts.shape
  away = counts.sum(1) - counts[np.arange(E), owners(E, W)]
  return int(away[~np.isin(np.arange(E), shadowed)].sum())


class _Prefixes(NamedTuple):
  """The most popular experts, shadowed one after another.

  Attributes:
    experts: The numbers of the experts, by their number of tokens, [R].
    rows: Number of rows of each device with none to R of them, [R + 1, W].
    seconds: The seconds with none to R of them, [R + 1].
    number: r, the number that Algorithm 1 shadows: as long as each pays.
  """

  experts: Any
  rows: Any
  seconds: Any
  number: Any


def by_popularity(
  counts: Any, most: int, xp: ModuleType
) -> tuple[Any, Any, Any]:
  """The order in which experts are shadowed, by numpy or by `jax.numpy`.

  Args:
    counts: The number of rows of each device that choose each expert, [E, W].
    most: R, the largest number of shadowed experts.
    xp: The module of the arrays.

  Returns:
    The device that has each expert, [E]; its number of rows, [E]; and the
    experts that have most of them, the lower number first of equals, [R].

  Raises:
    ValueError: The experts cannot be divided over the devices, or `most` is not
      in [0, E].
  """
  E, W = counts.shape
  if not 0 <= most <= E:
    raise InputError(f'most={most} not in [0, num_experts={E}]')
  totals = counts.sum(1)
  return owners(E, W), totals, xp.argsort(-totals, stable=True)[:most]


def _prefixes(
  counts: Any, sizes: Sizes, speeds: Speeds, most: int, xp: ModuleType
) -> _Prefixes:
  """The choices that Algorithm 1 compares, by numpy or by `jax.numpy`."""
  W = counts.shape[1]
  owner, totals, experts = by_popularity(counts, most, xp)
  device = xp.arange(W)[None]
  is_owner = owner[:, None] == device  # [E, W]
  # Where an expert is shadowed, its device loses all of its rows, and every
  # device keeps its own.
  change = counts - is_owner * totals[:, None]
  baseline = (is_owner * totals[:, None]).sum(0, keepdims=True)
  rows = xp.concatenate([baseline, baseline + xp.cumsum(change[experts], 0)])
  comp = 3 * sizes.row_flops / speeds.flops * rows.max(1)
  numbers = xp.arange(len(experts) + 1)
  comm = 2 * numbers * (sizes.expert_rows / speeds.elements)
  exchange = 4 * sizes.M / speeds.elements * rows[0].max()
  seconds = comp + xp.where(numbers == 0, exchange, comm)
  pays = xp.cumprod(seconds[1:] < seconds[:-1])
  return _Prefixes(experts, rows, seconds, pays.sum())


def choose(
  counts: Int[np.ndarray, 'E W'],
  sizes: Sizes,
  speeds: Speeds,
  *,
  most: int | None = None,
) -> Choice:
  """Algorithm 1: experts by their number of tokens, as long as it pays.

  Where two experts have equally many tokens, the lower number comes first. With
  more experts than devices, E = c W, device w has the c experts from c w on; in
  the paper, and for c = 1, each device has one.

  Args:
    counts: The number of rows of each device that choose each expert.
    sizes: The sizes of the experts.
    speeds: The speeds of the devices.
    most: Largest number of shadowed experts; None for no bound.

  Raises:
    ValueError: The experts cannot be divided over the devices, or `most` is not
      in [0, E].
  """
  counts = np.asarray(counts)
  most = len(counts) if most is None else most
  prefixes = _prefixes(counts, sizes, speeds, most, np)
  r = int(prefixes.number)
  return Choice(
    tuple(prefixes.experts[:r].tolist()),
    prefixes.rows[r],
    float(prefixes.seconds[r]),
    float(prefixes.seconds[0]),
  )


def choose_in_step(
  counts: Int[Array, 'E W'], sizes: Sizes, speeds: Speeds, *, most: int
) -> Int[Array, ' R']:
  """The experts that `choose` shadows, inside a compiled step.

  Args:
    counts: The number of rows of each device that choose each expert.
    sizes: The sizes of the experts.
    speeds: The speeds of the devices.
    most: R, the largest number of shadowed experts, which buffers have room
      for.

  Returns:
    The numbers of the experts, then E for each of the R that is not used.
    Seconds are float32 here, so that two choices whose seconds agree to seven
    digits may be told apart otherwise than by `choose`.

  Raises:
    ValueError: As `choose`.
  """
  E = counts.shape[0]
  prefixes = _prefixes(counts, sizes, speeds, most, jnp)
  used = jnp.arange(len(prefixes.experts)) < prefixes.number
  return jnp.where(used, prefixes.experts, E)


def least_rows(
  number: int | float | Int[np.ndarray, ' N'], sizes: Sizes
) -> float | Float[np.ndarray, ' N']:
  """The number r F of rows in n_max > r F, the threshold that FasterMoE prints.

  If the busiest device has more, the 4 n_max M elements of rows in Lat_imbl are
  more than the 4 r M F of parameters and gradients in Lat_shadow. (An expert of
  three kernels has half as many again, and F counts for 3/2.) Shadowing pays if
  also no device has more rows than n_max afterwards, whatever the speeds are.

  Args:
    number: r, the number of shadowed experts, or of each case, or a mean.
    sizes: The sizes of the experts.
  """
  return number * sizes.expert_rows / (2 * sizes.M)
