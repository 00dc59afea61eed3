"""The shares of a run's wall time, over two processes, by a told clock."""

import concurrent.futures

import jax
import numpy as np
import pytest

from moe_jax.data import DataOptions, SpanCorruptionTask
from moe_jax.routing import empty_aux
from moe_jax.runs import goodput, metrics
from moe_jax.runs.recorder import Recorder
from moe_jax.runs.summary import LossSums, StepMetrics

# Five rows of eight inputs and four targets each: 60 tokens.
ROWS, DATA = 5, DataOptions(task=SpanCorruptionTask(), seq_len=8, target_len=4)


class World:
  """A clock, and a device that ends its step when the test says so.

  Attributes:
    time: Seconds since 1970.
  """

  time = 0.0

  def __init__(self, *_):
    self._pending = []

  def wait(self, seconds):
    self.time += seconds

  def submit(self, function, *arguments):
    future = concurrent.futures.Future()
    self._pending.append((future, function, arguments))
    return future

  def end_step(self):
    future, function, arguments = self._pending.pop()
    future.set_result(function(*arguments))

  def shutdown(self, wait):
    assert not wait


@pytest.fixture
def world(monkeypatch):
  world = World()
  monkeypatch.setattr(goodput, 'now', lambda: world.time)
  monkeypatch.setattr(
    concurrent.futures, 'ThreadPoolExecutor', lambda *_: world
  )
  return world


def recorder_in(folder, **options):
  return Recorder(
    folder, total_steps=9, log_every_steps=2, max_nonfinite_steps=0,
    batch_tokens=ROWS * DATA.row_tokens, moes=(), state=None,
    checkpoints=None, tell=str, **options,
  )  # fmt: skip


def metrics_of_step():
  aux = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape)), empty_aux(1, 1))
  sums = LossSums(*np.ones(3), aux)
  return StepMetrics(
    np.float32(1), sums, np.float32(1), np.float32(1), np.array([True])
  )


def rows(folder):
  read = metrics.read_metrics(folder / metrics.FILE_NAME)
  return [
    {key.removeprefix('train/'): value for key, value in row.items()}
    for row in read
    if 'train/loss' in row
  ]


def test_the_time_of_two_processes_by_cause(world, tmp_path):
  world.time = 1000.0
  recorder = recorder_in(tmp_path, least_step_seconds=2.0)
  step = metrics_of_step()
  with recorder.recording(0, begun=990.0):  # the set-up took 10 s
    with recorder.waiting():
      world.wait(4)
    world.wait(30)  # the first step is compiled
    recorder.add(1, step, {})
    world.end_step()
    recorder.add(2, step, {})  # and its metrics are read
    with recorder.waiting():
      world.wait(3)
      world.end_step()
      world.wait(1)  # only now does the device wait for the batch
    world.wait(2)
    recorder.add(3, step, {})  # writes the row of step 2
    with recorder.paused('checkpoint'):
      world.wait(5)
    with recorder.paused('evaluation'):
      world.wait(20)
    world.wait(5)
    recorder.add(4, step, {})
    with recorder.paused('checkpoint'):  # writes the row of step 4
      world.wait(10)
  first, second = rows(tmp_path)
  # Of the 50 s until the first row the steps have 5 and the data has 5.
  expected = {
    'goodput': 0.1,
    'lost_to_compile': 0.6,
    'lost_to_data': 0.1,
    'lost_to_evaluation': 0.0,
    'lost_to_checkpoint': 0.0,
    'lost_to_restart': 0.2,
    'run_seconds': 50.0,
    'time': 1040.0,
    # One step, of 5 s, and the second that it waited for its batch.
    'step_seconds': 6.0,
    'tokens_per_second': 10.0,
    'mfu': 2 / 6,
  }
  assert {k: first[k] for k in expected} == pytest.approx(expected)
  assert (second['time'], second['run_seconds']) == (1070.0, 80.0)
  assert second['goodput'] == pytest.approx(10 / 80)
  assert second['lost_to_evaluation'] == pytest.approx(20 / 80)
  assert second['lost_to_checkpoint'] == pytest.approx(5 / 80)

  # The process dies, and the next one goes on from the checkpoint of step 2,
  # after the row of 1040.0: what came later was in vain.
  world.time = 1100.0
  recorder = recorder_in(tmp_path)
  with recorder.recording(2, begun=1095.0):
    world.wait(10)
    for number in (3, 4):
      recorder.add(number, step, {})
      world.wait(15)
    with recorder.paused('evaluation'):
      world.wait(99)
  _, last = rows(tmp_path)
  assert (last['time'], last['run_seconds']) == (1140.0, 150.0)
  assert last['lost_to_restart'] == pytest.approx((10 + 60) / 150)
  assert last['lost_to_compile'] == pytest.approx((30 + 10 + 15) / 150)
  assert last['goodput'] == pytest.approx((5 + 15) / 150)
  assert 'mfu' not in last
