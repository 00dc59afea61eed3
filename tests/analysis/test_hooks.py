"""A run's report on its devices, and the trace of its steps."""

import dataclasses
import gzip
import json
import logging

import jax
import pytest

from moe_jax import run_config
from moe_jax.analysis import hooks, sharded
from moe_jax.config import OptionError
from moe_jax.training import loop, setup
from moe_jax.training.evaluate import Losses
from moe_jax.training.setup import Hook
from tests.training import tiny
from tests.training.hooks import SigtermAt

ONE = jax.devices()[:1]


def options(**overrides):
  """Options of a run of a few steps without evaluations."""
  config = tiny.config(
    batch_size=8, checkpoint={'every_steps': 0, 'keep_best': False}, **overrides
  )
  config.evals = {}
  return run_config.read(config)


def train(folder, *run_hooks, **overrides):
  """Trains on one device; returns the last state."""
  return loop.train_and_evaluate(
    options(**overrides), folder, hooks=run_hooks, devices=ONE
  )


MESH = {'data': 2, 'expert': 4}
OPTIONS = options(
  total_steps=4,
  mesh=MESH,
  profile={'start_step': 2, 'num_steps': 2},
  model={'num_layers': 1, 'moe': {'layers': 'all'}},
)


class Watch(Hook):
  """Records the run and its messages."""

  def start(self, run):
    self.run = run
    self.lines = []
    return dataclasses.replace(run, message=self.lines.append)


@pytest.fixture(scope='module')
def profiled_run(tmp_path_factory):
  """A profiled run on eight devices, and its compiled program."""
  watch, folder, messages = Watch(), tmp_path_factory.mktemp('run'), []
  run_hooks = [watch, hooks.MeshSummary(), hooks.Profile(), hooks.Facts()]
  handler = logging.Handler()
  handler.emit = lambda record: messages.append(record.getMessage())
  logger = logging.getLogger('jax')
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      loop.train_and_evaluate(OPTIONS, folder, hooks=run_hooks)
  finally:
    logger.removeHandler(handler)
  return watch, [line for line in messages if line.startswith('Compiling')]


def test_the_summary_tells_of_each_device(profiled_run):
  watch, _ = profiled_run
  summary = watch.lines[0]
  state = watch.run.programs.abstract_state
  params = jax.tree.leaves(state.params)
  experts = 4 * 2 * 16 * 20 * 4  # E kernels in and out [M, F], float32
  rest = sum(4 * leaf.size for leaf in params) - experts
  expected = rest + experts // 4
  assert sharded.device_bytes(state.params) == expected
  assert f'{expected / 1000:.3g} kB of parameters' in summary
  # The state has two moments for each parameter.
  assert f'{2 * expected / 1000:.3g} kB of optimizer state' in summary
  assert 'all-reduce (' in summary


def test_the_step_is_compiled_once_after_a_word(profiled_run):
  watch, compilations = profiled_run
  assert any(line.startswith('compiling') for line in watch.lines)
  # Neither summary nor trace compile their own.
  steps = [line for line in compilations if 'train_step' in line]
  assert len(steps) == 1, compilations


def test_the_trace_has_the_steps_that_were_asked_for(profiled_run):
  watch, _ = profiled_run
  (path,) = (watch.run.workdir / 'profile').rglob('*.trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  steps = {e['args']['step_num'] for e in events if e.get('name') == 'train'}
  assert steps == {'2', '3'}
  # The trace has the devices' operations, for TensorBoard and Perfetto.
  names = {event.get('name', '') for event in events}
  assert any('dot' in name or 'fusion' in name for name in names)
  assert any(line.startswith('profile: steps up to 3') for line in watch.lines)


def test_a_profile_after_the_last_step_is_refused():
  tiny.options(profile={'start_step': 6, 'num_steps': 1})
  with pytest.raises(OptionError, match='start_step=7 is beyond the last step'):
    tiny.options(profile={'start_step': 7, 'num_steps': 1})


@pytest.mark.slow
def test_a_trace_that_a_signal_cuts_short_is_written(tmp_path):
  profile = {'start_step': 1, 'num_steps': 3, 'all_processes': True}
  run_hooks = hooks.Profile(), SigtermAt(1)
  state = train(tmp_path, *run_hooks, model=tiny.ONE_LAYER, profile=profile)
  assert int(state.step) == 1
  folder = tmp_path / 'profile' / 'process_0'
  assert len(list(folder.rglob('*.trace.json.gz'))) == 1


@pytest.mark.slow
def test_a_decoder_that_learns_pairs_ends_with_an_answer(tmp_path):
  source = {'kind': 'instructions', 'instructions': {'task': 'reverse'}}
  pairs = {'task': {'kind': 'seq2seq'}, 'source': source}
  sample = {'prompt': 'Reverse: ab', 'num_tokens': 3}
  short = dict(total_steps=1, model=tiny.ONE_LAYER)
  train(tmp_path, hooks.Sample(), data=pairs, sample=sample, **short)
  sample = (tmp_path / 'sample.txt').read_text()
  assert sample.startswith('inputs: Reverse: ab\noutputs: ')


def test_a_model_that_does_not_decode_ends_without_a_sample(tmp_path):
  moe = {'router': {'kind': 'expert_choice'}, 'allow_future_leak': True}
  run = setup.set_up(options(model={'moe': moe}), tmp_path, devices=ONE)
  lines = []
  hooks.Sample().end(dataclasses.replace(run, message=lines.append), None)
  assert lines[0].startswith('no sample: ') and 'decode' in lines[0]
  assert not (tmp_path / 'sample.txt').exists()


@pytest.mark.slow
def test_the_report_drops_as_an_evaluation_does(tmp_path):
  router = {'token_choice': {'gates': 'renormalized'}}
  capacity = {'kind': 'per_token', 'per_token': {'factor': 1.0}}
  moe = dict(num_selected=2, layers='all', router=router, capacity=capacity)
  run = setup.set_up(options(model={'moe': moe}), tmp_path, devices=ONE)
  state = run.programs.init_state()
  metrics = Losses(
    model=run.model,
    num_batches=8,  # as many as the report reads
    rows=run.dataset.splits['validation'],
    put=run.programs.put,
  )(run.programs.variables(state), 0)
  layers, _ = hooks.routing_tables(run, state)
  assert [row['layer'] for row in layers.rows] == [0, 1]
  for row in layers.rows:
    # Each token has two choices, and capacity is for one.
    assert row['dropped'] >= 0.5
    for name, key in (('dropped', ''), ('choice 2', '_choice_2')):
      rate = metrics[f'layer_{row["layer"]}/drop_rate{key}']
      assert row[name] == pytest.approx(rate)
