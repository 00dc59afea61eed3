"""The numbers of a row of metrics, by hand, and shares of wall time."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.data import DataOptions, SpanCorruptionTask
from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.routing import empty_aux
from moe_jax.routing.stats import ExchangeStats
from moe_jax.runs import goodput, metrics, summary
from moe_jax.runs.recorder import Recorder
from moe_jax.runs.summary import LossSums, StepMetrics
from tests import own_kinds

# A dense layer, one of three experts, and one of four.
MOES = (None, MoeOptions(3, 2), MoeOptions(4, 2))


LOSSES = ('balance_loss', 'z_loss', 'sequence_balance_loss')


def numpy_aux(stats=(), **sums):
  """The sums of a layer with room for four experts, and K = 2 choices."""
  aux = jax.tree.map(np.asarray, empty_aux(4, 2, LOSSES))
  return aux._replace(stats=aux.stats._replace(**dict(stats)), **sums)


def sums_of_three_layers():
  """Eight tokens of sparse layers, and losses of five tokens."""
  # The experts serve 13 of 16 choices; two second choices found their expert
  # full, and one was not sent.
  first = numpy_aux(
    dict(
      tokens=8.0, load=[8.0, 4, 4, 0], kept_load=[5.0, 4, 4, 0],
      overflowed=[0.0, 2], unsent=[0.0, 1], entropy=4.0, logit_square=18.0,
    ),
    losses=dict(balance_loss=12.0, z_loss=4.0, sequence_balance_loss=2.0),
    exchange=ExchangeStats(
      away=6.5, sent=2.6, shadowed=3.0, choices=2.0, overflow=1.3
    ),
  )  # fmt: skip
  second = numpy_aux(
    dict(
      tokens=8.0, load=[4.0] * 4, kept_load=[4.0, 4, 2, 0],
      overflowed=[2.0, 4],
    ),
  )  # fmt: skip
  aux = jax.tree.map(
    lambda *leaves: np.stack([np.asarray(leaf, float) for leaf in leaves]),
    *(numpy_aux(), first, second),
    is_leaf=lambda leaf: isinstance(leaf, list),
  )
  return LossSums(20.0, 5.0, 0.0, aux)


def test_a_row_by_hand():
  row = summary.summarize(sums_of_three_layers(), MOES)
  first = {
    'drop_rate': 2 / 16,
    'load_cv': 8**-0.5,  # mean 16 / 3, variance (16 / 3)^2 / 8
    'load_max_over_mean': 1.5,
    'unused_experts': 0,
    'entropy': 0.5,
    'router_logit_rms': 1.5,
    'drop_rate_choice_1': 0.0,
    'unsent_rate_choice_1': 0.0,
    'drop_rate_choice_2': 2 / 8,
    'unsent_rate_choice_2': 1 / 8,
    # The share is one of the 13 choices that are served.
    'away_share': 0.5,
    'sent_share': 0.2,
    'shadowed_experts': 1.5,
    'exchange_overflow': 0.1,
    'balance_loss': 1.5,
    'z_loss': 0.5,
    'importance_loss': 0.0,
    'load_loss': 0.0,
    'sequence_balance_loss': 0.25,
    'load': [0.5, 0.25, 0.25],
    'kept_load': [0.3125, 0.25, 0.25],
  }
  layers = {
    key.removeprefix('layer_1/'): value
    for key, value in row.items()
    if key.startswith('layer_1/')
  }
  assert layers.keys() == first.keys()
  for name, value in first.items():
    np.testing.assert_allclose(layers[name], value, rtol=1e-6, err_msg=name)
  assert row['layer_2/kept_load'] == [0.25, 0.25, 0.125, 0]
  assert row['layer_2/drop_rate'] == 6 / 16
  # The loss is per weight, and the drop rate the mean of sparse layers.
  assert (row['loss'], row['drop_rate']) == (4.0, 0.25)
  assert not [key for key in row if key.startswith('layer_0/')]
  # A metric is left out where nothing happened.
  assert not {'layer_2/sent_share', 'layer_2/sequence_balance_loss'} & {*row}


def test_a_layer_of_fewer_choices_than_others_has_its_own_rates():
  # An encoder's layer of K = 1 stands beside a decoder's of K = 2.
  aux = numpy_aux(
    dict(
      tokens=8.0, load=np.array([6.0, 2, 0, 0]),
      kept_load=np.array([4.0, 2, 0, 0]), overflowed=np.array([2.0, 0]),
    ),
  )  # fmt: skip
  aux = jax.tree.map(lambda leaf: np.asarray(leaf)[None], aux)
  sums = LossSums(20.0, 5.0, 0.0, aux)
  row = summary.layer_summary(sums, 0, (MoeOptions(4, 1),))
  assert row['drop_rate'] == 2 / 8 and 'drop_rate_choice_1' not in row
  assert row['load'] == [0.75, 0.25, 0, 0]


def test_a_router_that_names_an_expert_that_is_not_there_is_refused():
  index = jnp.array([[[0], [99], [3], [2], [1]]])
  chosen = routing.even_choice(
    index, num_experts=4, capacity=5, mask=jnp.ones((1, 5), bool)
  )
  stats = routing.routing_stats(chosen, None, jnp.ones((1, 5), bool))
  aux = empty_aux(4, 1)._replace(stats=stats)
  sums = LossSums(20.0, 5.0, 0.0, jax.tree.map(lambda leaf: leaf[None], aux))
  moes = (MoeOptions(4, 1, router=own_kinds.InTurn()),)
  message = "4 of the 5 choices.*'tests.own_kinds:InTurn'.*experts 0 to 3"
  with pytest.raises(InputError, match=message):
    summary.summarize(summary.host(sums), moes)


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
