"""The cost of a layer whose experts are on many devices, from a cost model.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418) takes
a layer's computation to last as long as that of its slowest device, and an
exchange as long as its slowest link has bytes to carry. Nothing here is
measured: the seconds are those of a described machine. An expert is two
kernels, of M inputs and F hidden units and back, or three if it is gated.

Not here: machines (`topology.py`), and which experts are best sent to all
devices (`shadowing.py`).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.parallel.topology import Topology
from moe_jax.shapes import Float, Int


class Sizes(NamedTuple):
  """The sizes of a layer's experts.

  Attributes:
    M: Width of the model.
    F: Hidden width of an expert.
    bytes_per_element: Bytes of an element of a row that travels.
    kernels: Number of an expert's kernels: 2, 3 with a gate, or 4 with two.
    bytes_per_parameter: Bytes of a parameter that travels; 0: those of an
      element of a row.
  """

  M: int
  F: int
  bytes_per_element: int = 4
  kernels: int = 2
  bytes_per_parameter: int = 0

  @property
  def row_flops(self) -> int:
    """FLOPs of the forward pass for a row of an expert."""
    return 2 * self.expert_elements

  @property
  def row_bytes(self) -> int:
    """Bytes of a row that travels."""
    return self.M * self.bytes_per_element

  @property
  def expert_bytes(self) -> int:
    """Bytes of an expert's kernels."""
    size = self.bytes_per_parameter or self.bytes_per_element
    return self.expert_elements * size

  @property
  def expert_rows(self) -> float:
    """The number of elements of rows that have the bytes of an expert."""
    return self.expert_bytes / self.bytes_per_element

  def that_travel(self, dtype: str) -> 'Sizes':
    """The sizes where rows travel in another type; '' keeps their own."""
    size = np.dtype(jnp.dtype(dtype)).itemsize if dtype else None
    return self._replace(bytes_per_element=size or self.bytes_per_element)

  @property
  def expert_elements(self) -> int:
    """Number of values of an expert's kernels."""
    return self.kernels * self.M * self.F


class Latency(NamedTuple):
  """The seconds of one forward pass of a layer's experts.

  Attributes:
    comp: Seconds of the products of the device that has the most rows.
    comm: Seconds of one exchange, the mean of the way there and the way back.
    rows: Number of rows of all devices.
  """

  comp: float
  comm: float
  rows: int

  @property
  def synchronous(self) -> float:
    """Seconds of a training step in which nothing overlaps.

    The backward pass has two products for each of the forward pass, and either
    pass has two exchanges.
    """
    return 3 * self.comp + 4 * self.comm

  @property
  def overlapped(self) -> float:
    """Seconds of a training step in which all that can overlap does."""
    return max(3 * self.comp, 4 * self.comm)

  @property
  def ratio(self) -> float:
    """R_CC, computation over communication of a training step.

    It is x in Figure 4 of FasterMoE, the roofline of a layer. The totals of a
    step are taken, so that a synchronous step lies on the semi-ideal curve.
    """
    return 3 * self.comp / (4 * self.comm) if self.comm else math.inf


def owners(num_experts: int, num_devices: int) -> Int[np.ndarray, ' E']:
  """The device that has each expert, as many experts on each.

  Raises:
    ValueError: The experts cannot be divided so.
  """
  if num_experts % num_devices:
    raise InputError(
      f'num_experts={num_experts} is not divisible by the {num_devices} devices'
    )
  return np.arange(num_experts) // (num_experts // num_devices)


def received_rows(
  counts: Int[np.ndarray, '*N E W'],
) -> Int[np.ndarray, '*N W W']:
  """The number of rows that each device gets from each, those of its own too.

  Args:
    counts: The number of rows of each device that choose each expert, with any
      leading axes.

  Raises:
    ValueError: The experts cannot be divided over the devices.
  """
  *N, E, W = counts.shape
  owners(E, W)
  return counts.reshape(*N, W, E // W, W).sum(-2)


def latency(
  topology: Topology, counts: Int[np.ndarray, 'E W'], sizes: Sizes
) -> Latency:
  """The latencies of a layer whose rows all go to their experts' devices.

  Args:
    topology: The machine.
    counts: The number of rows of each device that choose each expert.
    sizes: The sizes of the experts.

  Raises:
    ValueError: The counts are not those of the topology's devices.
  """
  counts = np.asarray(counts)
  W = counts.shape[-1]
  if topology.num_devices != W:
    raise InputError(
      f'counts of {W} devices; topology {topology.name!r} has '
      f'{topology.num_devices}'
    )
  received = received_rows(counts)
  rows = received.sum(1).max(initial=0)
  way_seconds = [
    topology.seconds(topology.all_to_all(sent * float(sizes.row_bytes)))
    for sent in (received.T, received)
  ]
  return Latency(
    comp=float(rows * sizes.row_flops / topology.flops_per_second),
    comm=sum(way_seconds) / 2,
    rows=int(counts.sum()),
  )


def ideal(
  flops_per_second: float, ratio: Float[np.ndarray, ' N']
) -> Float[np.ndarray, ' N']:
  """The FLOPs per second of a device if all overlaps, by `Latency.ratio`."""
  return flops_per_second * np.minimum(1.0, ratio)


def semi_ideal(
  flops_per_second: float, ratio: Float[np.ndarray, ' N']
) -> Float[np.ndarray, ' N']:
  """The FLOPs per second of a device if nothing overlaps, by `Latency.ratio`.

  They are those of a layer whose devices have equally many rows.
  """
  ratio = np.asarray(ratio, float)
  return flops_per_second * np.where(
    np.isinf(ratio), 1.0, ratio / (np.where(np.isinf(ratio), 0, ratio) + 1.0)
  )


def achieved(
  topology: Topology,
  sizes: Sizes,
  rows: int | Int[np.ndarray, ' N'],
  seconds: float | Float[np.ndarray, ' N'],
) -> float | Float[np.ndarray, ' N']:
  """The mean FLOPs per second of a device in a training step, or in several.

  They are y in Figure 4 of FasterMoE, the roofline of a layer.

  Args:
    topology: The machine.
    sizes: The sizes of the experts.
    rows: Number of rows of all devices, of one step or of each.
    seconds: Seconds of the step, or of each.
  """
  return 3 * sizes.row_flops * rows / (topology.num_devices * seconds)
