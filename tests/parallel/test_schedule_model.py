"""The smart schedule's seconds by hand and by events, and its bounds."""

import numpy as np
import pytest

from moe_jax.parallel import cost_model, schedule_model, topology
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.schedule_model import Stages
from tests.parallel.test_cost_model import RING, TWO_BY_TWO

SIZES = Sizes(M=10, F=5, bytes_per_element=2)  # 20 bytes and 200 FLOPs a row
MACHINES = [
  TWO_BY_TWO,
  RING,
  topology.torus('torus', (2, 3), link=7.0, flops_per_second=900.0),
]


def stages(send, compute, give_back, shadow_send=0.0, shadow_compute=None):
  """The stages of one layer."""
  arrays = send, compute, give_back, shadow_send, shadow_compute or [0, 0]
  return Stages(*(np.array([a], float) for a in arrays))


def test_a_pass_by_hand():
  # Arrivals at 2 and 7. Device 0 multiplies in 2-5 and 7-8, device 1 in 2-3 and
  # 7-11. The first results leave when all have theirs and the second S is over,
  # in 7-9, the second in 11-14.
  plain = stages([2, 5], [[3, 1], [1, 4]], [2, 3])
  assert schedule_model.forward_seconds(plain) == 14
  assert schedule_model.backward_seconds(plain) == 14
  assert (plain.comm, plain.comp) == (12, 5)
  assert (plain.sequential, plain.overlapped) == (17, 12)
  # Parameters are sent in 7-10, results in 10-12 and 12-15. Device 0 multiplies
  # its shadowed rows in 10-19, and device 1 in 11-12.
  shadowed = stages([2, 5], [[3, 1], [1, 4]], [2, 3], 3, [9, 1])
  assert schedule_model.forward_seconds(shadowed) == 19
  # Backwards, device 0 multiplies them in 0-9 and its others in 9-12 and 12-13,
  # device 1 in 0-1, 2-3 and 7-11. Gradients are summed in 9-12, results follow
  # in 12-14 and 14-17.
  assert schedule_model.backward_seconds(shadowed) == 17


def in_events(stages: Stages, backward: bool) -> float:
  """The pass as operations that wait for others, one after another."""
  stages = Stages(*(values[0] for values in stages))
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
    draw = stages(
      send=rng.exponential(size=g),
      compute=rng.exponential(size=(g, W)) * rng.choice([0, 0.2, 3]),
      give_back=rng.exponential(size=g),
      shadow_send=shadow,
      shadow_compute=[*rng.exponential(size=W) * (shadow > 0)],
    )
    for backward, seconds in enumerate(
      (schedule_model.forward_seconds, schedule_model.backward_seconds)
    ):
      expected = in_events(draw, bool(backward))
      np.testing.assert_allclose(seconds(draw), expected, rtol=1e-12)
      assert draw.overlapped <= expected * (1 + 1e-12)
      assert expected <= draw.sequential * (1 + 1e-12)


def test_the_stages_of_two_nodes_by_hand():
  # Expert e is on device e; node 0 has devices 0 and 1. Rows of experts 0 to 3:
  counts = np.array([[4, 0, 0, 0], [3, 0, 0, 0], [6, 0, 0, 1], [0, 5, 0, 0]])
  plain = schedule_model.step(TWO_BY_TWO, counts[None], SIZES, num_groups=2)
  # In S_0 device 0 sends 3 rows of 20 bytes to device 1, by links of 100 bytes
  # a second, and device 3 sends 1 to device 2. In S_1 node 0 sends 6 + 5 rows
  # by a link of 50 bytes a second.
  np.testing.assert_allclose(plain.forward.send[0], [0.6, 4.4])
  np.testing.assert_allclose(plain.forward.give_back[0], [0.6, 4.4])
  # A row takes 0.2 s. Device 2 gets 1 row of its node and 6 of the other.
  np.testing.assert_allclose(
    plain.forward.compute[0], [[0.8, 0.6, 0.2, 0], [0, 0, 1.2, 1]]
  )
  # S_0 0-0.6, S_1 0.6-5, C_1 of device 2 5-6.2, R_0 5-5.6, R_1 6.2-10.6.
  seconds = schedule_model.forward_seconds(plain.forward)
  np.testing.assert_allclose(seconds, 10.6)
  np.testing.assert_allclose(plain.backward.compute, 2 * plain.forward.compute)
  np.testing.assert_allclose(plain.scheduled, 10.6 + 11.8)
  # Expert 2 has 100 parameters, 200 bytes; the slowest link takes 4 s for them.
  shadow = np.arange(4) == 2
  step = schedule_model.step(
    TWO_BY_TWO, counts[None], SIZES, num_groups=2, shadowed=shadow[None]
  )
  np.testing.assert_allclose(step.forward.send[0], [0.6, 2.0])
  np.testing.assert_allclose(step.forward.shadow_send, 4)
  np.testing.assert_allclose(step.forward.shadow_compute[0], [1.2, 0, 0, 0.2])
  np.testing.assert_allclose(step.forward.compute[..., 2], 0)


def test_steps_of_a_ring_send_to_the_group_before():
  counts = np.zeros((4, 4), int)
  counts[1, 3] = 5  # device 3 sends to device 1: 1 = 3 - 2
  counts[3, 0] = 2  # device 0 sends to device 3: 3 = 0 - 1
  stages = schedule_model.step(RING, counts[None], SIZES, num_groups=4).forward
  np.testing.assert_allclose(stages.send[0], [0, 2 * 2, 5 * 2, 0])
  np.testing.assert_allclose(stages.compute[0, 2], [0, 5 * 0.2, 0, 0])


@pytest.mark.parametrize('machine', MACHINES)
def test_bounds_on_draws(machine):
  rng = np.random.default_rng(1)
  W = machine.num_devices
  counts = rng.integers(0, 30, (20, 2 * W, W)) ** 2
  shadowed = rng.random((20, 2 * W)) < 0.1
  one_group = schedule_model.step(machine, counts, SIZES)
  grouped = schedule_model.step(machine, counts, SIZES, num_groups=W // 2)
  for i, layer in enumerate(counts):
    plain = cost_model.latency(machine, layer, SIZES)
    np.testing.assert_allclose(one_group.sequential[i], plain.synchronous)
    np.testing.assert_allclose(one_group.overlapped[i], plain.overlapped)
  # A sum of slowest links is no less than the slowest link of the sum.
  assert (grouped.comm >= one_group.comm * (1 - 1e-12)).all()
  assert (grouped.scheduled >= one_group.overlapped * (1 - 1e-12)).all()
  np.testing.assert_allclose(one_group.scheduled, one_group.sequential)
  options = dict(num_groups=W // 2, shadowed=shadowed)
  shadow = schedule_model.step(machine, counts, SIZES, **options)
  assert (shadow.scheduled >= shadow.overlapped * (1 - 1e-12)).all()
  assert (shadow.scheduled <= shadow.sequential * (1 + 1e-12)).all()


@pytest.mark.parametrize('machine', MACHINES)
def test_many_exchanges_at_once_are_those_one_by_one(machine):
  rng = np.random.default_rng(2)
  W = machine.num_devices
  sent = rng.integers(0, 9, (3, 2, W, W)).astype(float)
  seconds = machine.all_to_all_seconds(sent)
  sizes = rng.integers(0, 9, (3, 2, W)).astype(float)
  trees = machine.broadcast_seconds(sizes)
  for index in np.ndindex(3, 2):
    expected = machine.seconds(machine.all_to_all(sent[index]))
    np.testing.assert_allclose(seconds[index], expected)
    total = {}
    for root, size in enumerate(sizes[index]):
      for link, carried in machine.broadcast(size, root).items():
        total[link] = total.get(link, 0.0) + carried
    np.testing.assert_allclose(trees[index], machine.seconds(total))


def test_a_device_alone_sends_nothing():
  device = topology.torus('one', (1,), link=1.0, flops_per_second=200.0)
  step = schedule_model.step(device, np.array([[[3], [4]]]), SIZES)
  assert (step.comm, step.comp, step.scheduled) == (0, 21, 21)


def test_what_cannot_be_is_refused():
  counts = np.ones((1, 4, 4), int)
  with pytest.raises(ValueError, match='num_groups=3 does not divide the 4'):
    schedule_model.step(RING, counts, SIZES, num_groups=3)
  with pytest.raises(ValueError, match="2 devices; topology 'ring' has 4"):
    schedule_model.step(RING, counts[..., :2], SIZES)
  with pytest.raises(ValueError, match='num_experts=3 is not divisible'):
    schedule_model.step(RING, counts[:, :3], SIZES)
