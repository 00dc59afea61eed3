"""The described machines on which FasterMoE is simulated.

The numbers of nodes and devices, the bandwidth between nodes and the share of
the peak that products reach are the paper's. Bandwidths inside a node and peaks
are nominal numbers of the vendors, and assumptions here. Not here: what links
carry (`moe_jax.parallel.topology`).
"""

import dataclasses
import re

from moe_jax.options import unknown
from moe_jax.parallel import topology
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.shadowing import Speeds
from moe_jax.parallel.topology import Topology

# The share of its peak that a device reaches in products.
GEMM = 0.9
# Devices of a group of the smart schedule, FMOE_FASTER_GROUP_SIZE of FastMoE.
GROUP = 4
# Bytes of an element of the types that V100s multiply, and their peaks.
BYTES = {'float32': 4, 'float16': 2}
_PCIE = {'float32': 14e12, 'float16': 112e12}
_SXM2 = {'float32': 15.7e12, 'float16': 125e12}
_TORUS = re.compile(r'tpu:([1-9]\d?(?:x[1-9]\d?)*)')
# Widths that FastMoE's shadowing policy assumes, the defaults of its variables
# FMOE_FASTER_GLBPLC_DMODEL and _ALPHA; a layer's own default is another.
WIDTH, HIDDEN = 2048, 4096
# Tokens of a device, an assumption: the references have no batch size.
TOKENS = 4096
NAMES = ('johnny', 'trevor', 'tpu:4x4')
# Nodes of devices: their numbers, GB/s of a device within its node and of a
# node to the network, and TFLOP/s of a device's products.
_NODES = re.compile(
  r'nodes:([1-9]\d?)x([1-9]\d?):local=([\d.]+):network=([\d.]+):'
  r'teraflops=([\d.]+)'
)
OTHERS = 'nodes:4x8:local=150:network=12.5:teraflops=14'
# The bandwidth that the rules of shadowing are given, in words for reports.
_BY_NODE = (
  "; the rules of shadowing are given a node's link to the network as the "
  'bandwidth of each of its devices'
)
_BY_LINK = '; the rules of shadowing are given one link as that of each device'


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
  def num_groups(self) -> int:
    """g, the number of groups of the smart schedule; at least one."""
    W = self.num_devices
    return W // GROUP if W % GROUP == 0 else W

  @property
  def outgoing(self) -> float:
    """The share of a device's tokens that may leave its node, L / n.

    L = beta_net / (m beta_local) n, with m devices on a node, the paper's.
    """
    per_node = self.num_devices // self.num_nodes
    return min(1.0, self.network / (per_node * self.local))

  def speeds(self, sizes: Sizes) -> Speeds:
    """The speeds that the rules of shadowing are given."""
    flops = self.topology.flops_per_second
    return Speeds.of_bytes(flops, self.network, sizes)


def get(name: str, dtype: str = 'float32') -> Cluster:
  """The machine of that name.

  Args:
    name: 'johnny' or 'trevor', the paper's clusters, a slice of TPUs as a
      torus, 'tpu:4x4', or any nodes, as `OTHERS` describes them: numbers of
      nodes and of devices on each, GB/s each way of a device within its node
      and of a node to the network, TFLOP/s of a device's products.
    dtype: Type of what V100s, and the devices of `nodes:...`, multiply and
      send; TPUs have bfloat16.

  Raises:
    ValueError: There is no such machine, or no such type.
  """
  if dtype not in BYTES:
    raise unknown('dtype', dtype, BYTES)
  if name == 'johnny':
    return _v100s(
      name, 2, 8, _PCIE[dtype], 15.75e9, 'PCIe 3.0 x16', 6.25e9, dtype
    )
  if name == 'trevor':
    return _v100s(name, 16, 4, _SXM2[dtype], 150e9, 'NVLink', 12.5e9, dtype)
  if match := _TORUS.fullmatch(name):
    return _torus(name, [int(size) for size in match[1].split('x')])
  if match := _NODES.fullmatch(name):
    return _nodes(name, *map(float, match.groups()), dtype)
  raise unknown('topology', name, (*NAMES, OTHERS))


def _v100s(
  name: str,
  num_nodes: int,
  per_node: int,
  peak: float,
  local: float,
  link: str,
  network: float,
  dtype: str,
) -> Cluster:
  machine = topology.nodes(
    name,
    num_nodes=num_nodes,
    per_node=per_node,
    local=local,
    network=network,
    flops_per_second=GEMM * peak,
  )
  kind = 'V100-PCIe' if name == 'johnny' else 'V100-SXM2'
  row = 'johnny, 16xV100' if name == 'johnny' else 'trevor, 64 GPUs'
  words = (
    f'{name}: {num_nodes} nodes of {per_node} {kind}, EDR at '
    f'{network * 8e-9:g} Gb/s a node, products at {GEMM:.0%} of the peak (from '
    f'the paper); peak {peak / 1e12:g} TFLOP/s of {dtype} (assumed: nominal, '
    f'NVIDIA), {link} {local / 1e9:g} GB/s each way between a device and the '
    f'switch of its node (assumed: nominal){_BY_NODE}'
  )
  return Cluster(machine, network, local, num_nodes, BYTES[dtype], row, words)


def _nodes(
  name: str,
  num_nodes: float,
  per_node: float,
  local: float,
  network: float,
  teraflops: float,
  dtype: str,
) -> Cluster:
  machine = topology.nodes(
    name,
    num_nodes=int(num_nodes),
    per_node=int(per_node),
    local=local * 1e9,
    network=network * 1e9,
    flops_per_second=teraflops * 1e12,
  )
  return Cluster(
    machine,
    network * 1e9,
    local * 1e9,
    int(num_nodes),
    BYTES[dtype],
    '',
    f'{name}: all numbers are those of the command, of {dtype}{_BY_NODE}',
  )


def _torus(name: str, shape: list[int]) -> Cluster:
  peak, link = 197e12, 50e9
  machine = topology.torus(name, shape, link=link, flops_per_second=GEMM * peak)
  words = (
    f'{name}: a torus of {"x".join(map(str, shape))} TPU v5e (described; none '
    f'in the paper), peak {peak / 1e12:g} TFLOP/s of bfloat16 (assumed: '
    f'nominal, Google) at {GEMM:.0%}, {link / 1e9:g} GB/s each way on a link '
    '(assumed: a quarter of the nominal 1,600 Gb/s of a chip), with a link '
    'from the last coordinate to the first (assumed; a small slice may lack '
    f'it){_BY_LINK}'
  )
  return Cluster(machine, link, link, 1, 2, '', words)
