"""Descriptions of machines: devices, links between them, and what links carry.

The bytes that a collective sends over each link are those of FasterMoE's cost
model (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moe_jax.shapes import Float

# An end of a link: a device's index, or the name of a switch. A directed link
# is the pair of the two ends.
Place = int | str
Link = tuple[Place, Place]


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
  """

  name: str
  flops_per_second: float
  links: Mapping[Link, float]
  paths: Mapping[tuple[int, int], Sequence[Link]]

  @functools.cached_property
  def num_devices(self) -> int:
    """W, the number of devices, which are numbered from 0."""
    return 1 + max((max(pair) for pair in self.paths), default=0)

  def all_to_all_seconds(
    self, sent: Float[np.ndarray, '*N W W']
  ) -> Float[np.ndarray, '*N']:
    """The seconds of the slowest link if each device sends to each other one.

    Args:
      sent: The bytes from each device to each, with any leading axes; bytes
        that a device keeps are on no link.
    """
    flat = sent.reshape(*sent.shape[:-2], -1)
    return np.asarray((flat @ self._pairs).max(-1, initial=0.0))

  def broadcast_seconds(
    self, sizes: Float[np.ndarray, '*N W']
  ) -> Float[np.ndarray, '*N']:
    """The seconds in which all devices at once send bytes to all other devices.

    Each link on the paths from a device carries the device's bytes once. To sum
    as many bytes to the device takes as long, by the same links the other way.

    Args:
      sizes: The bytes of each device, with any leading axes.
    """
    return np.asarray((sizes @ self._trees).max(-1, initial=0.0))

  @functools.cached_property
  def _pairs(self) -> Float[np.ndarray, 'P L']:
    """The seconds that a byte from one device to another takes on each link.

    There are P = W * W ordered pairs of devices and L links.
    """
    devices = range(self.num_devices)
    pairs = itertools.product(devices, devices)
    return self._per_byte([self.paths.get(pair, ()) for pair in pairs])

  @functools.cached_property
  def _trees(self) -> Float[np.ndarray, 'W L']:
    """The seconds that a byte broadcast by each of W devices takes on a link.

    There are L links.
    """
    trees = [set[Link]() for _ in range(self.num_devices)]
    for (root, _), path in self.paths.items():
      trees[root].update(path)
    return self._per_byte(trees)

  def _per_byte(self, carried: Sequence[Iterable[Link]]) -> np.ndarray:
    number = {link: i for i, link in enumerate(self.links)}
    seconds = np.zeros((len(carried), len(number)))
    for row, links in zip(seconds, carried, strict=True):
      for link in links:
        row[number[link]] = 1 / self.links[link]
    return seconds


def nodes(
  name: str,
  *,
  num_nodes: int,
  per_node: int,
  local: float,
  network: float,
  flops_per_second: float,
) -> Topology:
  """A machine of nodes; each has devices and a switch, and a network joins all.

  Args:
    name: Name for reports.
    num_nodes: Number of nodes.
    per_node: Number of devices of a node.
    local: Bytes per second, each way, between a device and its node's switch.
    network: Bytes per second, each way, between a node and the network.
    flops_per_second: FLOPs that a device computes in a second.
  """
  links: dict[Link, float] = {}
  paths: dict[tuple[int, int], list[Link]] = {}
  for pair in itertools.permutations(range(num_nodes * per_node), 2):
    source, target = (f'node {device // per_node}' for device in pair)
    switches = [source] if source == target else [source, 'network', target]
    paths[pair] = list(itertools.pairwise([pair[0], *switches, pair[1]]))
    links |= {
      link: network if 'network' in link else local for link in paths[pair]
    }
  return Topology(name, flops_per_second, links, paths)


def torus(
  name: str, shape: Sequence[int], *, link: float, flops_per_second: float
) -> Topology:
  """A torus of devices, as a whole pod of TPUs is.

  Every dimension has links from its last coordinate to its first, which a small
  slice of a pod may lack.

  A path goes along one dimension after another, the shorter way round. Where
  two ways are equally long, the path takes the one without the link from the
  last coordinate to the first; a machine that uses both ways has less to carry
  on its busiest link.

  Args:
    name: Name for reports.
    shape: Number of devices along each dimension; the last one counts fastest.
    link: Bytes per second, each way, between neighbours.
    flops_per_second: FLOPs that a device computes in a second.
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
      for _ in range(min(forward, size - forward)):
        source[axis] = (source[axis] + (1 if up else -1)) % size
        places.append(int(np.ravel_multi_index(tuple(source), tuple(shape))))
    paths[pair] = list(itertools.pairwise(places))
    links |= dict.fromkeys(paths[pair], link)
  return Topology(name, flops_per_second, links, paths)
