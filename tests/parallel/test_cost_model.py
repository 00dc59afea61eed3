"""Latencies of FasterMoE's cost model, worked out by hand."""

import numpy as np
import pytest

from moe_jax.parallel import cost_model, topology
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.topology import Topology

SIZES = Sizes(M=10, F=5, bytes_per_element=2)  # 20 bytes and 200 FLOPs a row
TWO_BY_TWO = topology.nodes(
  'two nodes of two',
  num_nodes=2,
  per_node=2,
  local=100.0,
  network=50.0,
  flops_per_second=1000.0,
)
RING = topology.torus('ring', (4,), link=10.0, flops_per_second=1000.0)


def test_an_exchange_waits_for_its_slowest_link():
  sent = np.zeros((4, 4))
  sent[0, 1], sent[0, 2], sent[1, 3], sent[2, 2] = 60, 20, 40, 999
  traffic = TWO_BY_TWO.all_to_all(sent)
  assert traffic[0, 'node 0'] == 80 and traffic['node 0', 1] == 60
  assert traffic['node 0', 'network'] == traffic['network', 'node 1'] == 60
  assert ('node 1', 'network') not in traffic and (2, 'node 1') not in traffic
  # 80 bytes of 100 a second, and 60 of 50.
  assert TWO_BY_TWO.seconds(traffic) == 60 / 50


def test_paths_of_a_torus_are_the_shorter_way_round():
  assert RING.paths[0, 3] == [(0, 3)]
  assert RING.paths[0, 2] == [(0, 1), (1, 2)]
  assert RING.paths[2, 0] == [(2, 1), (1, 0)]
  sent = np.zeros((4, 4))
  sent[0, 2], sent[1, 2], sent[3, 0] = 30, 5, 7
  assert RING.all_to_all(sent) == {(0, 1): 30, (1, 2): 35, (3, 0): 7}
  square = topology.torus('torus', (2, 3), link=1.0, flops_per_second=1.0)
  # Device 1 is (0, 1) and device 5 is (1, 2): down first, then right.
  assert square.paths[1, 5] == [(1, 4), (4, 5)]
  assert square.num_devices == 6


def test_sums_in_a_ring_and_broadcasts():
  ring = RING.ring_all_reduce(80.0)
  assert ring == {(d, (d + 1) % 4): 120.0 for d in range(4)}
  nodes = TWO_BY_TWO.ring_all_reduce(80.0)
  # Both nodes have one way out in the ring, 1 to 2 and 3 to 0.
  assert nodes['node 0', 'network'] == nodes['node 1', 'network'] == 120.0
  tree = TWO_BY_TWO.broadcast(40.0, 1)
  assert set(tree.values()) == {40.0}
  assert (1, 'node 0') in tree and ('network', 'node 1') in tree
  assert ('node 0', 1) not in tree and len(tree) == 6
  device = topology.torus('one', (1,), link=1.0, flops_per_second=1.0)
  assert device.ring_all_reduce(9.0) == device.broadcast(9.0, 0) == {}


@pytest.mark.parametrize('machine', [TWO_BY_TWO, RING])
def test_a_layers_latency_by_hand(machine):
  # Expert 1, on device 1, has 9 rows of device 0 and 1 row of device 1.
  counts = np.zeros((4, 4), int)
  counts[1, 0], counts[1, 1], counts[3, 3] = 9, 1, 4
  latency = cost_model.latency(machine, counts, SIZES)
  assert latency.rows == 14
  assert latency.comp == 10 * 200 / 1000
  slowest = 100 if machine is TWO_BY_TWO else 10
  assert latency.comm == 9 * 20 / slowest
  assert latency.synchronous == 3 * latency.comp + 4 * latency.comm
  assert latency.overlapped == max(3 * latency.comp, 4 * latency.comm)


def test_the_way_back_of_a_torus_may_be_another():
  square = topology.torus('torus', (2, 2), link=1.0, flops_per_second=1.0)
  assert square.paths[0, 3] == [(0, 2), (2, 3)]
  assert square.paths[3, 0] == [(3, 1), (1, 0)]
  # Expert 3 has 2 rows of device 0 and 5 of device 2. Those of device 0 pass
  # device 2, and go back by device 1.
  counts = np.zeros((4, 4), int)
  counts[3, 0], counts[3, 2] = 2, 5
  latency = cost_model.latency(square, counts, Sizes(1, 1, 1))
  assert latency.comm == (7 + 5) / 2


def test_experts_of_one_device_share_it():
  counts = np.zeros((8, 4), int)
  counts[2, 0], counts[3, 0] = 5, 6  # both are on device 1
  latency = cost_model.latency(RING, counts, SIZES)
  assert (latency.comp, latency.comm) == (11 * 0.2, 11 * 20 / 10)


@pytest.mark.parametrize('rows', [1, 7, 400])
def test_synchronous_steps_of_even_rows_lie_on_the_semi_ideal_curve(rows):
  counts = np.full((4, 4), rows)
  latency = cost_model.latency(TWO_BY_TWO, counts, SIZES)
  peak = TWO_BY_TWO.flops_per_second
  for seconds, curve in (
    (latency.synchronous, cost_model.semi_ideal),
    (latency.overlapped, cost_model.ideal),
  ):
    reached = cost_model.achieved(TWO_BY_TWO, SIZES, latency.rows, seconds)
    expected = curve(peak, np.array([latency.ratio]))
    np.testing.assert_allclose(reached, expected[0], rtol=1e-12)


def test_a_device_alone_reaches_its_peak():
  device = topology.torus('one', (1,), link=1.0, flops_per_second=7.0)
  # A single device has no path, and so one device is what the topology has.
  latency = cost_model.latency(device, np.array([[5]]), SIZES)
  assert latency.comm == 0 and latency.ratio == np.inf
  for curve in (cost_model.ideal, cost_model.semi_ideal):
    assert curve(7.0, np.array([latency.ratio])) == 7.0


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'flops_per_second': 0.0}, 'flops_per_second=0.0 must be above 0'),
    ({'links': {(0, 1): 0.0, (1, 0): 1.0}}, r'link \(0, 1\) has 0.0 bytes'),
    ({'paths': {(0, 1): [(0, 1)]}}, 'from device 1 to 0 is missing'),
    (
      {'paths': {(0, 1): [(0, 1)], (1, 0): [(1, 2)]}},
      r'from device 1 to 0 has \(1, 2\), which is no link',
    ),
    (
      {'paths': {(0, 1): [(1, 0)], (1, 0): [(1, 0)]}},
      'from device 0 to 1 does not lead there',
    ),
  ],
)
def test_a_topology_that_cannot_be_is_refused(change, message):
  fields = dict(
    name='two',
    flops_per_second=1.0,
    links={(0, 1): 1.0, (1, 0): 1.0},
    paths={(0, 1): [(0, 1)], (1, 0): [(1, 0)]},
  )
  Topology(**fields)
  with pytest.raises(ValueError, match=f"topology 'two': .*{message}"):
    Topology(**fields | change)


def test_a_machine_without_devices_is_refused():
  speeds = dict(flops_per_second=1.0)
  with pytest.raises(ValueError, match=r"'none': sizes \(0, 2\) must be"):
    topology.nodes(
      'none', num_nodes=0, per_node=2, local=1.0, network=1.0, **speeds
    )
  with pytest.raises(ValueError, match=r"'none': sizes \(\) must be"):
    topology.torus('none', (), link=1.0, **speeds)


def test_counts_of_other_devices_are_refused():
  with pytest.raises(
    ValueError, match='num_experts=6 is not divisible by the 4'
  ):
    cost_model.latency(RING, np.ones((6, 4), int), SIZES)
  with pytest.raises(ValueError, match="3 devices; topology 'ring' has 4"):
    cost_model.latency(RING, np.ones((8, 3), int), SIZES)
  with pytest.raises(ValueError, match='has 4 devices; bytes of shape'):
    RING.all_to_all(np.ones((3, 3)))
