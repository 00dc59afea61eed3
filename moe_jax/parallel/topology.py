"""Described machines: devices, the links between them, and what links carry.

The traffic of a collective is that of FasterMoE's cost model (He et al., PPoPP
2022, https://doi.org/10.1145/3503221.3508418). Not here: what a layer computes
and sends (`cost_model.py`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moe_jax.errors import InputError
from moe_jax.shapes import Float

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
      raise InputError(
        f'topology {self.name!r}: flops_per_second={self.flops_per_second} '
        'must be above 0'
      )
    for link, speed in self.links.items():
      if not speed > 0:
        raise InputError(
          f'topology {self.name!r}: link {link} has {speed} bytes per second, '
          'which must be above 0'
        )
    for pair in itertools.permutations(range(self.num_devices), 2):
      self._check_path(*pair)

  @functools.cached_property
  def num_devices(self) -> int:
    """W, the number of devices, which are numbered from 0."""
    return 1 + max((max(pair) for pair in self.paths), default=0)

  def _check_path(self, source: int, target: int) -> None:
    text = f'topology {self.name!r}: the path from device {source} to {target}'
    path = self.paths.get((source, target))
    if not path:
      raise InputError(f'{text} is missing')
    if unknown := [link for link in path if link not in self.links]:
      raise InputError(f'{text} has {unknown[0]}, which is no link')
    places = [source, *(end for _, end in path)]
    if [begin for begin, _ in path] != places[:-1] or places[-1] != target:
      raise InputError(f'{text} does not lead there: {list(path)}')

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
      raise InputError(
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
    targets = (target for target in range(self.num_devices) if target != root)
    tree = itertools.chain.from_iterable(self.paths[root, t] for t in targets)
    return dict.fromkeys(tree, float(size))

  def all_to_all_seconds(
    self, sent: Float[np.ndarray, '*N W W']
  ) -> Float[np.ndarray, '*N']:
    """The times of many exchanges: `seconds` of `all_to_all`, one by one.

    Args:
      sent: As in `all_to_all`, with any leading axes.
    """
    W = self.num_devices
    return self._slowest(
      self._pairs, np.reshape(sent, (-1, W * W)), sent.shape[:-2]
    )

  def broadcast_seconds(
    self, sizes: Float[np.ndarray, '*N W']
  ) -> Float[np.ndarray, '*N']:
    """The times in which devices send bytes of theirs to all others, at once.

    Args:
      sizes: The bytes of each device, with any leading axes.
    """
    flat = np.reshape(sizes, (-1, self.num_devices))
    return self._slowest(self._trees, flat, sizes.shape[:-1])

  def _slowest(self, links, sizes, shape) -> Float[np.ndarray, '*N']:
    return (links @ sizes.T).max(0, initial=0.0).reshape(shape)

  @functools.cached_property
  def _pairs(self):
    """Seconds of each link for a byte of each pair of devices, [L, W * W]."""
    W = self.num_devices
    return self._per_byte(
      {s * W + t: path for (s, t), path in self.paths.items() if s != t}, W * W
    )

  @functools.cached_property
  def _trees(self):
    """Seconds of each link for a byte that each device broadcasts, [L, W]."""
    W = self.num_devices
    return self._per_byte(
      {root: self.broadcast(1.0, root) for root in range(W)}, W
    )

  def _per_byte(self, link_sets: Mapping[int, Iterable[Link]], size: int):
    """A sparse array of the seconds of each link, [L, size]."""
    # Imported here, as it is a twentieth of the time of `import moe_jax`.
    from scipy import sparse

    number = {link: i for i, link in enumerate(self.links)}
    cells = [(number[k], i) for i, links in link_sets.items() for k in links]
    speeds = np.array([*self.links.values()], float)
    rows, columns = np.array(cells, int).reshape(-1, 2).T
    return sparse.csr_array(
      (1 / speeds[rows], (rows, columns)), shape=(len(speeds), size)
    )


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

  Raises:
    ValueError: A number is too small.
  """
  _check_sizes(name, (num_nodes, per_node))
  links: dict[Link, float] = {}
  for node in range(num_nodes):
    switch = f'node {node}'
    for device in range(node * per_node, (node + 1) * per_node):
      links[device, switch] = links[switch, device] = local
    if num_nodes > 1:
      links[switch, 'network'] = links['network', switch] = network

  def path(source: int, target: int) -> list[Link]:
    ends = f'node {source // per_node}', f'node {target // per_node}'
    switches = (
      [ends[0]] if ends[0] == ends[1] else [ends[0], 'network', ends[1]]
    )
    return list(itertools.pairwise([source, *switches, target]))

  pairs = itertools.permutations(range(num_nodes * per_node), 2)
  paths = {pair: path(*pair) for pair in pairs}
  return Topology(name, flops_per_second, links, paths)


def torus(
  name: str, shape: Sequence[int], *, link: float, flops_per_second: float
) -> Topology:
  """A torus of devices, as a whole pod of TPUs is.

  A small slice of a pod may lack the links from the last coordinate to the
  first, which all dimensions have here.

  A path goes along one dimension after another, the shorter way round. Where
  two ways are equally long, the path takes the one without the link from the
  last coordinate to the first; a machine that uses both ways has less to carry
  on its busiest link.

  Args:
    name: Name for reports.
    shape: Number of devices along each dimension; the last one counts fastest.
    link: Bytes per second, each way, between neighbours.
    flops_per_second: See `Topology`.

  Raises:
    ValueError: A number is too small.
  """
  _check_sizes(name, shape)
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


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
  if min(sizes, default=0) < 1:
    raise InputError(
      f'topology {name!r}: sizes {tuple(sizes)} must be at least 1'
    )
