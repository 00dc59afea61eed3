"""Dynamic shadowing: which experts are worth sending to all devices.

FasterMoE (He et al., PPoPP 2022), section 4.1. The parameters of a shadowed
expert go to every device, whose tokens for it stay, and its gradients go back
to the device that has it. That pays where an expert has so many tokens that all
wait for its device. Counts of one step decide for the same step.

Not here: how long an exchange takes on a network of links (`cost_model.py`).
Here, as in the paper's Algorithm 1, all devices have one bandwidth.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from moe_jax.parallel.cost_model import Sizes, owners
from moe_jax.shapes import Int


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
        raise ValueError(f'{name}={value} a second must be above 0')

  @classmethod
  def of_bytes(
    cls, flops: float, bytes_per_second: float, sizes: Sizes
  ) -> 'Speeds':
    """The speeds of a network whose bandwidth is in bytes per second."""
    return cls(flops, bytes_per_second / sizes.bytes_per_element)


class Choice(NamedTuple):
  """The experts that are shadowed, and what the model says of it.

  Attributes:
    experts: Their numbers, in the order in which they were chosen.
    rows: Number of rows of each device once they are shadowed, [W].
    seconds: Seconds of a training step of the layer's experts with them.
    seconds_before: Seconds without any.
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


def imbalanced_seconds(
  rows: Int[np.ndarray, ' W'], sizes: Sizes, speeds: Speeds
) -> float:
  """Lat_imbl: the seconds of a training step in which nothing is shadowed."""
  n = float(np.max(rows))
  comp = 3 * sizes.row_flops * n / speeds.flops
  return comp + 4 * n * sizes.M / speeds.elements


def shadowed_seconds(
  number: int, rows: Int[np.ndarray, ' W'], sizes: Sizes, speeds: Speeds
) -> float:
  """Lat_shadow (equation 8): the seconds with that many shadowed experts.

  Parameters are sent once and gradients summed once; the exchange of the other
  experts' tokens is left out, as in the paper.

  Args:
    number: r, the number of shadowed experts.
    rows: Number of rows of each device once they are shadowed.
    sizes: The sizes of the experts.
    speeds: The speeds of the devices.
  """
  comp = 3 * sizes.row_flops * float(np.max(rows)) / speeds.flops
  return comp + 2 * number * 2 * sizes.M * sizes.F / speeds.elements


def choose(
  counts: Int[np.ndarray, 'E W'],
  sizes: Sizes,
  speeds: Speeds,
  *,
  most: int | None = None,
) -> Choice:
  """Algorithm 1: experts by their number of tokens, as long as it pays.

  Of two experts with as many tokens the lower number comes first. With more
  experts than devices, E = c W, device w has the experts c w to c w + c - 1; in
  the paper, and for c = 1, each has one.

  Args:
    counts: The number of rows of each device that choose each expert.
    sizes: The sizes of the experts.
    speeds: The speeds of the devices.
    most: Largest number of shadowed experts; None for no bound.

  Raises:
    ValueError: The experts cannot be divided over the devices.
  """
  counts = np.asarray(counts)
  rows = rows_of(counts)
  before = best = imbalanced_seconds(rows, sizes, speeds)
  shadowed: tuple[int, ...] = ()
  for expert in np.argsort(-counts.sum(1), kind='stable')[:most].tolist():
    more = (*shadowed, expert)
    moved = rows_of(counts, more)
    seconds = shadowed_seconds(len(more), moved, sizes, speeds)
    if seconds >= best:
      break
    shadowed, rows, best = more, moved, seconds
  return Choice(shadowed, rows, best, before)


def pays(counts: Int[np.ndarray, 'E W'], number: int, sizes: Sizes) -> bool:
  """Whether the most loaded device has more rows than r F.

  That is enough for shadowing r experts to take less traffic than it saves,
  whatever the speeds are: 4 n M elements of rows against 4 r M F of parameters
  and gradients.
  """
  return int(rows_of(counts).max()) > number * sizes.F
