"""The described machines on which FasterMoE is simulated.

The numbers of nodes and devices, the bandwidth between nodes and the share of
the peak that products reach are the paper's. Bandwidths inside a node and peaks
are nominal numbers of the vendors, and assumptions here.
"""

import dataclasses
from typing import Any

from moe_jax.parallel import topology
from moe_jax.parallel.topology import Topology

# The share of its peak that a device reaches in products.
GEMM = 0.9
# Devices of a group of the smart schedule, FMOE_FASTER_GROUP_SIZE of FastMoE.
GROUP = 4
# Widths that FastMoE's shadowing policy assumes, the defaults of its variables
# FMOE_FASTER_GLBPLC_DMODEL and _ALPHA; a layer's own default is another.
WIDTH, HIDDEN = 2048, 4096
# Tokens of a device, an assumption: the references have no batch size.
TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Cluster:
  """A described machine, with the numbers that FasterMoE's rules read.

  Attributes:
    topology: Devices and links.
    network: Bytes per second that Algorithm 1 takes all devices to have: those
      of a node's link to the network, or of a link of a torus.
    local: Bytes per second, each way, of a device within its node.
    num_nodes: Q, the number of nodes; 1 where there are none.
    bytes_per_element: Bytes of an element that travels.
    published: Name of the cluster's row in the paper's table of speed-ups; ''
      for none.
    sources: The numbers, and where each is from.
  """

  topology: Topology
  network: float
  local: float
  num_nodes: int
  bytes_per_element: int
  published: str
  sources: str

  @property
  def name(self) -> str:
    """Name of the machine."""
    return self.topology.name

  @property
  def num_devices(self) -> int:
    """W, the number of devices."""
    return self.topology.num_devices

  @property
  def outgoing(self) -> float:
    """The share of a device's tokens that may leave its node, L / n.

    L = beta_net / (m beta_local) n, with m devices on a node, the paper's.
    """
    per_node = self.num_devices // self.num_nodes
    return min(1.0, self.network / (per_node * self.local))


def _v100s(
  name: str,
  *,
  num_nodes: int,
  per_node: int,
  peak: float,
  socket: str,
  link: str,
  local: float,
  network: float,
  published: str,
) -> Cluster:
  """One of the paper's clusters, with elements of float32."""
  sizes = dict(num_nodes=num_nodes, per_node=per_node)
  speeds = dict(local=local, network=network, flops_per_second=GEMM * peak)
  machine = topology.nodes(name, **sizes, **speeds)
  words = (
    f'{name}: {num_nodes} nodes of {per_node} V100-{socket}, EDR at '
    f'{network * 8e-9:g} Gb/s a node, products at {GEMM:.0%} of the peak (from '
    f'the paper); peak {peak / 1e12:g} TFLOP/s of float32 (assumed: nominal, '
    f'NVIDIA), {link} {local / 1e9:g} GB/s each way between a device and the '
    "switch of its node (assumed: nominal); Algorithm 1 is given a node's link "
    'to the network as the bandwidth of each of its devices'
  )
  return Cluster(machine, network, local, num_nodes, 4, published, words)


def _tpus(name: str, peak: float = 197e12, link: float = 50e9) -> Cluster:
  """A slice of TPUs as a torus, with elements of bfloat16."""
  torus = topology.torus(name, (4, 4), link=link, flops_per_second=GEMM * peak)
  words = (
    f'{name}: a torus of 4x4 TPU v5e (described; none in the paper), peak '
    f'{peak / 1e12:g} TFLOP/s of bfloat16 (assumed: nominal, Google) at '
    f'{GEMM:.0%}, {link / 1e9:g} GB/s each way on a link (assumed: a quarter '
    'of the nominal 1,600 Gb/s of a chip), with a link from the last '
    'coordinate to the first (assumed; a small slice may lack it); Algorithm 1 '
    'is given one link as the bandwidth of each device'
  )
  return Cluster(torus, link, link, 1, 2, '', words)


_PCIE: Any = dict(socket='PCIe', link='PCIe 3.0 x16', local=15.75e9)
_SXM2: Any = dict(socket='SXM2', link='NVLink', local=150e9)
CLUSTERS = {
  cluster.name: cluster
  for cluster in (
    _v100s(
      'johnny',
      num_nodes=2,
      per_node=8,
      peak=14e12,
      network=6.25e9,
      published='johnny, 16xV100',
      **_PCIE,
    ),
    _v100s(
      'trevor',
      num_nodes=16,
      per_node=4,
      peak=15.7e12,
      network=12.5e9,
      published='trevor, 64 GPUs',
      **_SXM2,
    ),
    _tpus('tpu:4x4'),
  )
}
