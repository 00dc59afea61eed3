"""Exchange of ragged rows: the CPU's stand-in by hand and by plain loops."""

import functools

import jax
import numpy as np
from jax.sharding import PartitionSpec

from moe_jax.parallel import ragged
from moe_jax.partitioning import make_mesh

P, N, M = 4, 7, 3
MESH = make_mesh(dict(expert=P), jax.devices()[:P])
AXES = ('expert',)


def per_device(f):
  """Applies f to each device's own part, split along the leading axis."""
  spec = PartitionSpec('expert')
  return jax.jit(
    jax.shard_map(f, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False)
  )


def traffic(seed):
  """Rows of each device, the numbers sent to others, and starts of blocks."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(0, 3, (P, P)).astype(np.int32)
  sizes[1] = [0, 0, N, 0]  # one device sends all of its rows to one other
  gaps = rng.integers(0, 2, P).astype(np.int32)  # rows that are not sent
  starts = np.cumsum(sizes, 1, dtype=np.int32) - sizes
  room = N - sizes.sum(1)
  starts += np.minimum(gaps, np.maximum(room, 0))[:, None].astype(np.int32)
  rows = rng.normal(0, 1, (P, N, M)).astype(np.float32)
  return rows, np.minimum(sizes, np.maximum(N - starts, 0)), starts


def received(rows, sizes, starts, bound):
  """Rows that each device receives from the others, in order, by a loop."""
  out = np.zeros((P, bound, M), np.float32)
  for j in range(P):
    blocks = [
      rows[i, starts[i, j] : starts[i, j] + sizes[i, j]] for i in range(P)
    ]
    block = np.concatenate(blocks)
    out[j, : len(block)] = block
  return out


def test_told_rows():
  # Device 0 keeps a and sends b and c to device 1; device 1 sends d to device
  # 0; the others send none.
  a, b, c, d = np.eye(4, M + 1, dtype=np.float32)[:, :M] + 1
  rows = np.zeros((P, 3, M), np.float32)
  rows[0], rows[1, 0] = [a, b, c], d
  sizes = np.zeros((P, P), np.int32)
  sizes[0, :2], sizes[1, 0] = [1, 2], 1
  starts = np.cumsum(sizes, 1, dtype=np.int32) - sizes

  def send(rows, sizes, starts):
    plan = ragged.traffic(sizes[0], starts[0], AXES)
    return ragged.move(rows[0], plan, True, (3, 5), AXES)[None]

  received_rows = per_device(send)(rows, sizes, starts)
  np.testing.assert_array_equal(received_rows[0, :3], [a, d, 0 * a])
  np.testing.assert_array_equal(received_rows[1, :3], [b, c, 0 * a])
  assert not received_rows[2:].any()


def test_rows_arrive_and_return_and_gradients_go_the_other_way():
  rows, sizes, starts = traffic(0)
  bound = P * N
  expected_arrived = received(rows, sizes, starts, bound)
  rng = np.random.default_rng(9)
  weight = rng.normal(0, 1, expected_arrived.shape).astype(np.float32)

  def trip(rows, sizes, starts, weight):
    plan = ragged.traffic(sizes[0], starts[0], AXES)
    arrived = ragged.move(rows[0], plan, True, (N, bound), AXES)
    returned = ragged.move(arrived, plan, False, (N, bound), AXES)

    def total(x):
      return (ragged.move(x, plan, True, (N, bound), AXES) * weight[0]).sum()

    return arrived[None], returned[None], jax.grad(total)(rows[0])[None]

  arrived, returned, d_rows = per_device(trip)(rows, sizes, starts, weight)
  np.testing.assert_array_equal(arrived, expected_arrived)
  expected = np.zeros_like(rows)
  d_expected = np.zeros_like(rows)
  offsets = np.zeros(P, int)
  for i in range(P):
    for j in range(P):
      block = slice(starts[i, j], starts[i, j] + sizes[i, j])
      expected[i, block] = rows[i, block]
      d_expected[i, block] = weight[j, offsets[j] : offsets[j] + sizes[i, j]]
      offsets[j] += sizes[i, j]
  np.testing.assert_array_equal(returned, expected)
  np.testing.assert_array_equal(d_rows, d_expected)


def test_an_accelerator_gets_the_ragged_exchange():
  rows, sizes, starts = traffic(0)

  def send(rows, sizes, starts):
    plan = ragged.traffic(sizes[0], starts[0], AXES)
    return ragged.move(rows[0], plan, True, (N, P * N), AXES)[None]

  lower = functools.partial(per_device(send).trace(rows, sizes, starts).lower)
  for platform, is_ragged in (('tpu', True), ('cuda', True), ('cpu', False)):
    text = lower(lowering_platforms=(platform,)).as_text()
    assert ('ragged_all_to_all' in text) == is_ragged
