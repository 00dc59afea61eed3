"""What a layer whose experts are on many devices costs, from a cost model.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418) takes
a layer's computation to last as long as that of its slowest device, and an
exchange as long as its slowest link has bytes to carry. Nothing here is
measured: the seconds are those of a described machine. An expert is two
kernels, of M inputs and F hidden units and back.

Not here: which experts are best sent to all devices (`shadowing.py`).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.shapes import Float, Int

# A directed link between two places, a device's number or the name of a switch.
Place = int | str
Link = tuple[Place, Place]
# The bytes that each link carries.
Traffic = dict[Link, float]


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices and the links between them.

  Attributes:
    name: Name for reports.
    flops_per_second: FLOPs that a device computes in a second, two for a
      multiply-add.
    links: Bytes per second of each directed link.
    paths: The links on the way from a device to another one, for every two
      devices, in order.

  Raises:
    ValueError: A number is not above zero, a path is missing, or its links do
      not lead from the one device to the other.
  """

  name: str
  flops_per_second: float
  links: Mapping[Link, float]
  paths: Mapping[tuple[int, int], Sequence[Link]]

  def __post_init__(self):
    if not self.flops_per_second > 0:
      raise ValueError(
        f'topology {self.name!r}: flops_per_second={self.flops_per_second} '
        'must be above 0'
      )
    for link, speed in self.links.items():
      if not speed > 0:
        raise ValueError(
          f'topology {self.name!r}: link {link} has {speed} bytes per second, '
          'which must be above 0'
        )
    for pair in itertools.permutations(range(self.num_devices), 2):
      self._check_path(*pair)

  @property
  def num_devices(self) -> int:
    """W, the number of devices, which are numbered from 0."""
    return 1 + max((max(pair) for pair in self.paths), default=0)

  def _check_path(self, source: int, target: int) -> None:
    said = f'topology {self.name!r}: the path from device {source} to {target}'
    path = self.paths.get((source, target))
    if not path:
      raise ValueError(f'{said} is missing')
    if unknown := [link for link in path if link not in self.links]:
      raise ValueError(f'{said} has {unknown[0]}, which is no link')
    places = [source, *(end for _, end in path)]
    if [begin for begin, _ in path] != places[:-1] or places[-1] != target:
      raise ValueError(f'{said} does not lead there: {list(path)}')

  def seconds(self, traffic: Mapping[Link, float]) -> float:
    """The time in which the slowest link carries its bytes."""
    return max(
      (size / self.links[link] for link, size in traffic.items()), default=0.0
    )

  def all_to_all(self, sent: Float[np.ndarray, 'W W']) -> Traffic:
    """The bytes on each link when each device sends to each other one.

    Args:
      sent: The bytes from each device to each; those that a device keeps are
        on no link.
    """
    W = self.num_devices
    if np.shape(sent) != (W, W):
      raise ValueError(
        f'topology {self.name!r} has {W} devices; bytes of shape '
        f'{np.shape(sent)} are not [W, W]'
      )
    traffic: Traffic = {}
    for (source, target), path in self.paths.items():
      if source != target and sent[source][target]:
        _add(traffic, path, float(sent[source][target]))
    return traffic

  def ring_all_reduce(self, size: float) -> Traffic:
    """The bytes on each link when all devices sum `size` bytes in a ring.

    Each device sends 2 (W - 1) / W of them to the next one.
    """
    W = self.num_devices
    traffic: Traffic = {}
    for device in range(W if W > 1 else 0):
      path = self.paths[device, (device + 1) % W]
      _add(traffic, path, 2 * (W - 1) / W * size)
    return traffic

  def broadcast(self, size: float, root: int) -> Traffic:
    """The bytes on each link when `size` bytes go from a device to all others.

    Each link of the tree of paths carries them once. To sum as many bytes to
    the device takes the same links the other way round.
    """
    others = (target for target in range(self.num_devices) if target != root)
    tree = itertools.chain.from_iterable(self.paths[root, t] for t in others)
    return dict.fromkeys(tree, float(size))


def _add(traffic: Traffic, path: Iterable[Link], size: float) -> None:
  for link in path:
    traffic[link] = traffic.get(link, 0.0) + size


def nodes(
  name: str,
  *,
  num_nodes: int,
  per_node: int,
  local: float,
  network: float,
  flops_per_second: float,
) -> Topology:
  """Nodes of several devices, each with a switch, and a switch between nodes.

  Args:
    name: Name for reports.
    num_nodes: Number of nodes.
    per_node: Number of devices of a node.
    local: Bytes per second, each way, between a device and its node's switch.
    network: Bytes per second, each way, between a node and the network.
    flops_per_second: See `Topology`.
  """
  links: dict[Link, float] = {}
  for node in range(num_nodes):
    switch = f'node {node}'
    for device in range(node * per_node, (node + 1) * per_node):
      links[device, switch] = links[switch, device] = local
    if num_nodes > 1:
      links[switch, 'network'] = links['network', switch] = network

  def path(source: int, target: int) -> list[Link]:
    ends = f'node {source // per_node}', f'node {target // per_node}'
    between = [ends[0]] if ends[0] == ends[1] else [ends[0], 'network', ends[1]]
    return list(itertools.pairwise([source, *between, target]))

  pairs = itertools.permutations(range(num_nodes * per_node), 2)
  paths = {pair: path(*pair) for pair in pairs}
  return Topology(name, flops_per_second, links, paths)


def torus(
  name: str, shape: Sequence[int], *, link: float, flops_per_second: float
) -> Topology:
  """A torus of devices, as a slice of TPUs is.

  A path goes along one dimension after another, the shorter way round. Of two
  ways of one length it takes that without the link from the last coordinate to
  the first; a machine that uses both has less on its busiest link.

  Args:
    name: Name for reports.
    shape: Number of devices along each dimension; the last one counts fastest.
    link: Bytes per second, each way, between neighbours.
    flops_per_second: See `Topology`.
  """
  links: dict[Link, float] = {}
  paths: dict[tuple[int, int], list[Link]] = {}
  for pair in itertools.permutations(range(math.prod(shape)), 2):
    source, target = (np.array(np.unravel_index(d, shape)) for d in pair)
    places = [pair[0]]
    for axis, size in enumerate(shape):
      forward = (target[axis] - source[axis]) % size
      up = 2 * forward < size
      if 2 * forward == size:
        up = source[axis] < target[axis]
      step = 1 if up else -1
      for _ in range(min(forward, size - forward)):
        source[axis] = (source[axis] + step) % size
        places.append(int(np.ravel_multi_index(tuple(source), tuple(shape))))
    paths[pair] = list(itertools.pairwise(places))
    links |= dict.fromkeys(paths[pair], link)
  return Topology(name, flops_per_second, links, paths)


class Sizes(NamedTuple):
  """The sizes of a layer's experts.

  Attributes:
    M: Width of the model.
    F: Hidden width of an expert.
    bytes_per_element: Bytes of an element that travels, of a row or a kernel.
  """

  M: int
  F: int
  bytes_per_element: int = 4

  @property
  def row_flops(self) -> int:
    """FLOPs of the forward pass for a row of an expert."""
    return 4 * self.M * self.F

  @property
  def row_bytes(self) -> int:
    """Bytes of a row that travels."""
    return self.M * self.bytes_per_element

  @property
  def expert_bytes(self) -> int:
    """Bytes of an expert's two kernels."""
    return 2 * self.M * self.F * self.bytes_per_element


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
    raise ValueError(
      f'num_experts={num_experts} is not divisible by the {num_devices} devices'
    )
  return np.arange(num_experts) // (num_experts // num_devices)


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
  E, W = counts.shape
  if topology.num_devices != W:
    raise ValueError(
      f'counts of {W} devices; topology {topology.name!r} has '
      f'{topology.num_devices}'
    )
  received = np.zeros((W, W))  # rows of each device from each
  np.add.at(received, owners(E, W), counts)
  rows = received.sum(1).max(initial=0)
  ways = [
    topology.seconds(topology.all_to_all(sent * sizes.row_bytes))
    for sent in (received.T, received)
  ]
  return Latency(
    comp=float(rows * sizes.row_flops / topology.flops_per_second),
    comm=sum(ways) / 2,
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
  topology: Topology, sizes: Sizes, rows: int, seconds: float
) -> float:
  """The mean FLOPs per second of a device in a training step.

  They are y in Figure 4 of FasterMoE, the roofline of a layer.

  Args:
    topology: The machine.
    sizes: The sizes of the experts.
    rows: Number of rows of all devices.
    seconds: Seconds of the step.
  """
  return 3 * sizes.row_flops * rows / (topology.num_devices * seconds)
