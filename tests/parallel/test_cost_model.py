"""The cost model by hand, by a simulation of events, and its bounds."""

import numpy as np
import pytest

from moe_jax.parallel import cost_model, topology
from moe_jax.parallel.cost_model import Sizes, Step

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
  sent = np.zeros((2, 4, 4))
  sent[0, 0, 1], sent[0, 0, 2], sent[0, 1, 3], sent[0, 2, 2] = 60, 20, 40, 999
  sent[1, 0, 1], sent[1, 2, 1] = 60, 15
  # 60 bytes of node 0 for node 1, 50 a second; 75 for device 1, 100 a second.
  seconds = TWO_BY_TWO.all_to_all_seconds(sent)
  np.testing.assert_allclose(seconds, [60 / 50, 75 / 100])


def test_paths_of_a_torus_are_the_shorter_way_round():
  assert RING.paths[0, 3] == [(0, 3)]
  assert RING.paths[0, 2] == [(0, 1), (1, 2)]
  assert RING.paths[2, 0] == [(2, 1), (1, 0)]
  sent = np.zeros((4, 4))
  sent[0, 2], sent[1, 2], sent[3, 0] = 30, 5, 7
  assert RING.all_to_all_seconds(sent) == 35 / 10
  square = topology.torus('torus', (2, 3), link=1.0, flops_per_second=1.0)
  # Device 1 is (0, 1) and device 5 is (1, 2): down first, then right.
  assert square.paths[1, 5] == [(1, 4), (4, 5)]
  assert square.num_devices == 6


def test_a_broadcast_takes_each_link_of_its_tree_once():
  sizes = np.array([[0, 40.0, 0, 0], [30, 40, 0, 0]])
  # All of node 0 goes to the network by its link of 50 a second.
  np.testing.assert_allclose(
    TWO_BY_TWO.broadcast_seconds(sizes), [40 / 50, 70 / 50]
  )
  # Device 1 sends to 2, and by it to 3, while device 0 sends by 1 to 2.
  np.testing.assert_allclose(RING.broadcast_seconds(sizes), [4, 7])


@pytest.mark.parametrize('machine', [TWO_BY_TWO, RING])
def test_a_step_by_hand(machine):
  # Expert 1, on device 1, has 9 rows of device 0 and 1 row of device 1.
  counts = np.zeros((1, 4, 4), int)
  counts[0, 1, 0], counts[0, 1, 1], counts[0, 3, 3] = 9, 1, 4
  step = cost_model.step(machine, counts, SIZES)
  slowest = 100 if machine is TWO_BY_TWO else 10
  # Three times the products, and four exchanges.
  comp, comm = 3 * 10 * 200 / 1000, 4 * 9 * 20 / slowest
  np.testing.assert_allclose([*step.comp, *step.comm], [comp, comm])
  np.testing.assert_allclose(step.sequential, comp + comm)
  np.testing.assert_allclose(step.overlapped, max(comp, comm))
  np.testing.assert_allclose(step.ratio, comp / comm)


def test_the_way_back_of_a_torus_may_be_another():
  square = topology.torus('torus', (2, 2), link=1.0, flops_per_second=1.0)
  assert square.paths[0, 3] == [(0, 2), (2, 3)]
  assert square.paths[3, 0] == [(3, 1), (1, 0)]
  # Expert 3 has 2 rows of device 0 and 5 of device 2. Those of device 0 pass
  # device 2, and go back by device 1.
  counts = np.zeros((1, 4, 4), int)
  counts[0, 3, 0], counts[0, 3, 2] = 2, 5
  assert cost_model.step(square, counts, Sizes(1, 1, 1)).comm == 2 * (7 + 5)


def test_experts_of_one_device_share_it():
  counts = np.zeros((1, 8, 4), int)
  counts[0, 2, 0], counts[0, 3, 0] = 5, 6  # both are on device 1
  step = cost_model.step(RING, counts, SIZES)
  np.testing.assert_allclose(step.comp, 3 * 11 * 0.2)
  np.testing.assert_allclose(step.comm, 4 * 11 * 20 / 10)


def test_gathered_tokens_go_to_all_devices_and_their_sums_come_back():
  counts = np.zeros((1, 8, 4), int)
  counts[0, 2, 0], counts[0, 3, 0] = 5, 6  # both are on device 1
  tokens = np.array([[7, 2, 3, 1]])
  step = cost_model.step(RING, counts, SIZES, gathered=tokens)
  np.testing.assert_allclose(step.comp, 3 * 11 * 0.2)
  # The link from device 1 to device 2 carries the 7 tokens of device 0 and the
  # 2 of device 1, once each. A token has 20 bytes.
  busiest = 20 * (7 + 2) / 10
  np.testing.assert_allclose(step.comm, 2 * 2 * busiest)


@pytest.mark.parametrize('rows', [1, 400])
def test_steps_of_even_rows_lie_on_the_curves(rows):
  step = cost_model.step(TWO_BY_TWO, np.full((1, 4, 4), rows), SIZES)
  peak = TWO_BY_TWO.flops_per_second
  for seconds, curve in (
    (step.sequential, cost_model.semi_ideal),
    (step.overlapped, cost_model.ideal),
  ):
    reached = 3 * SIZES.row_flops * 4 * rows / seconds
    np.testing.assert_allclose(reached, curve(peak, step.ratio), rtol=1e-12)


def test_a_device_alone_sends_nothing_and_reaches_its_peak():
  device = topology.torus('one', (1,), link=1.0, flops_per_second=200.0)
  step = cost_model.step(device, np.array([[[3], [4]]]), SIZES)
  assert (step.comm, step.comp, step.scheduled) == (0, 21, 21)
  assert step.ratio == np.inf
  for curve in (cost_model.ideal, cost_model.semi_ideal):
    assert curve(7.0, step.ratio) == 7.0


def step_of(send, compute, give_back, shadow_send=0.0, shadow_compute=None):
  """The step of one layer."""
  arrays = send, compute, give_back, shadow_send, shadow_compute or [0, 0]
  return Step(*(np.array([a], float) for a in arrays))


def test_a_pass_by_hand():
  # Arrivals at 2 and 7. Device 0 multiplies in 2-5 and 7-8, device 1 in 2-3 and
  # 7-11. The first results leave when all have theirs and the second S is over,
  # in 7-9, the second in 11-14.
  plain = step_of([2, 5], [[3, 1], [1, 4]], [2, 3])
  assert plain.forward_seconds == 14
  # Backwards products take twice as long: 2-8 and 8-10, 2-4 and 7-15.
  assert plain.backward_seconds == 18
  assert (plain.comm, plain.comp) == (24, 15)
  assert (plain.sequential, plain.overlapped) == (39, 24)
  # Parameters are sent in 7-10, results in 10-12 and 12-15. Device 0 multiplies
  # its shadowed rows in 10-19, and device 1 in 11-12.
  shadowed = step_of([2, 5], [[3, 1], [1, 4]], [2, 3], 3, [9, 1])
  assert shadowed.forward_seconds == 19
  # Backwards, device 0 multiplies them in 0-18 and its others in 18-24 and
  # 24-26, device 1 in 0-2, 2-4 and 7-15. Gradients are summed in 18-21, results
  # follow in 24-26 and 26-29.
  assert shadowed.backward_seconds == 29


def in_events(step: Step, backward: bool) -> float:
  """A pass as operations that wait for others, one after another."""
  stages = Step(*(values[0] for values in step))
  if backward:
    stages = stages._replace(
      compute=2 * stages.compute, shadow_compute=2 * stages.shadow_compute
    )
  g, W = stages.compute.shape
  shadows = bool(stages.shadow_send > 0)
  comm = [('S', j, stages.send[j]) for j in range(g)]
  comm += [('B', 0, stages.shadow_send)] * shadows
  comm += [('R', j, stages.give_back[j]) for j in range(g)]
  streams = {'comm': comm}
  for w in range(W):
    computations = [('C', j, stages.compute[j, w]) for j in range(g)]
    shadow = [('X', 0, stages.shadow_compute[w])] * shadows
    streams[w] = shadow + computations if backward else computations + shadow
  ends, free_at = {}, dict.fromkeys(streams, 0.0)
  dependencies = {'C': lambda j, w: [('comm', 'S', j)]}
  dependencies['R'] = lambda j, w: [(v, 'C', j) for v in range(W)]
  if backward:
    dependencies['B'] = lambda j, w: [(v, 'X', 0) for v in range(W)]
  else:
    dependencies['X'] = lambda j, w: [('comm', 'B', 0)]
  while any(streams.values()):
    for name, operations in streams.items():
      while operations:
        kind, j, seconds = operations[0]
        waits = dependencies[kind](j, name) if kind in dependencies else []
        if any(wait not in ends for wait in waits):
          break
        begin = max([free_at[name], *(ends[wait] for wait in waits)])
        free_at[name] = ends[name, kind, j] = begin + seconds
        operations.pop(0)
  return max(free_at.values())


def test_passes_are_those_of_a_simulation_of_events():
  rng = np.random.default_rng(0)
  for _ in range(200):
    g, W = rng.integers(1, 5), rng.integers(1, 4)
    shadow = rng.choice([0.0, 1.3])
    draw = step_of(
      send=rng.exponential(size=g),
      compute=rng.exponential(size=(g, W)) * rng.choice([0, 0.2, 3]),
      give_back=rng.exponential(size=g),
      shadow_send=shadow,
      shadow_compute=[*rng.exponential(size=W) * (shadow > 0)],
    )
    forward, backward = in_events(draw, False), in_events(draw, True)
    np.testing.assert_allclose(draw.forward_seconds, forward, rtol=1e-12)
    np.testing.assert_allclose(draw.backward_seconds, backward, rtol=1e-12)
    assert draw.overlapped <= draw.scheduled * (1 + 1e-12)
    assert draw.scheduled <= draw.sequential * (1 + 1e-12)


def test_the_stages_of_two_nodes_by_hand():
  # Expert e is on device e; node 0 has devices 0 and 1. Rows of experts 0 to 3:
  counts = np.array([[4, 0, 0, 0], [3, 0, 0, 0], [6, 0, 0, 1], [0, 5, 0, 0]])
  plain = cost_model.step(TWO_BY_TWO, counts[None], SIZES, num_groups=2)
  # In S_0 device 0 sends 3 rows of 20 bytes to device 1, by links of 100 bytes
  # a second, and device 3 sends 1 to device 2. In S_1 node 0 sends 6 + 5 rows
  # by a link of 50 bytes a second.
  np.testing.assert_allclose(plain.send[0], [0.6, 4.4])
  np.testing.assert_allclose(plain.give_back[0], [0.6, 4.4])
  # A row takes 0.2 s. Device 2 gets 1 row of its node and 6 of the other.
  np.testing.assert_allclose(
    plain.compute[0], [[0.8, 0.6, 0.2, 0], [0, 0, 1.2, 1]]
  )
  # S_0 0-0.6, S_1 0.6-5, C_1 of device 2 5-6.2, R_0 5-5.6, R_1 6.2-10.6.
  np.testing.assert_allclose(plain.forward_seconds, 10.6)
  np.testing.assert_allclose(plain.scheduled, 10.6 + 11.8)
  # Expert 2 has 100 parameters, 200 bytes; the slowest link takes 4 s for them.
  shadow = np.arange(4) == 2
  step = cost_model.step(
    TWO_BY_TWO, counts[None], SIZES, num_groups=2, shadowed=shadow[None]
  )
  np.testing.assert_allclose(step.send[0], [0.6, 2.0])
  np.testing.assert_allclose(step.shadow_send, 4)
  np.testing.assert_allclose(step.shadow_compute[0], [1.2, 0, 0, 0.2])
  np.testing.assert_allclose(step.compute[..., 2], 0)


def test_steps_of_a_ring_send_to_the_group_before():
  counts = np.zeros((4, 4), int)
  counts[1, 3] = 5  # device 3 sends to device 1: 1 = 3 - 2
  counts[3, 0] = 2  # device 0 sends to device 3: 3 = 0 - 1
  stages = cost_model.step(RING, counts[None], SIZES, num_groups=4)
  np.testing.assert_allclose(stages.send[0], [0, 2 * 2, 5 * 2, 0])
  np.testing.assert_allclose(stages.compute[0, 2], [0, 5 * 0.2, 0, 0])


def test_what_cannot_be_is_refused():
  counts = np.ones((1, 4, 4), int)
  with pytest.raises(ValueError, match='num_groups=3 does not divide the 4'):
    cost_model.step(RING, counts, SIZES, num_groups=3)
  with pytest.raises(ValueError, match="2 devices; topology 'ring' has 4"):
    cost_model.step(RING, counts[..., :2], SIZES)
  with pytest.raises(ValueError, match='num_experts=3 is not divisible'):
    cost_model.step(RING, counts[:, :3], SIZES)
