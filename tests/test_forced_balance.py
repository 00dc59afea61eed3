"""Every output of a model whose experts are chosen evenly says so."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import generate, run_config
from moe_jax.analysis import hooks, record_evaluation, routes, traces
from moe_jax.analysis.recording import Traces
from moe_jax.analysis.replay import Replaying
from moe_jax.runs import metrics
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.setup import Hook
from tests.training import tiny

MOE = {
  'force_balance': 'round_robin',
  'capacity': {'kind': 'per_assignment', 'per_assignment': {'factor': 1.0}},
}
NOTE = "moe.force_balance='round_robin': experts are chosen whatever"


class Listen(Hook):
  """Keeps the messages of a run."""

  def start(self, run):
    self.messages = []
    return dataclasses.replace(run, message=self.messages.append)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The folder of a short run, and its messages."""
  folder, listener = tmp_path_factory.mktemp('run'), Listen()
  options = run_config.read(
    tiny.config(
      total_steps=2,
      log_every_steps=1,
      model={'moe': MOE},
      trace={'every_steps': 1},
    )
  )
  report_hooks = [hooks.Facts(), hooks.RoutingReport(), hooks.Sample()]
  report_hooks += [Replaying(), Traces()]
  train_and_evaluate(
    options, folder, hooks=[listener, *report_hooks], devices=jax.devices()[:1]
  )
  return folder, '\n'.join(listener.messages)


@pytest.mark.slow
def test_a_run_says_that_its_balance_is_forced(run, tmp_path, capsys):
  folder, messages = run
  assert f'WARNING: {NOTE}' in messages
  rows = metrics.read_metrics(folder / metrics.FILE_NAME)
  assert any(row.get('train/forced_balance') == 1 for row in rows)
  assert rows[-1]['eval/train_capacity/forced_balance'] == 1
  drops = [row['train/drop_rate'] for row in rows if 'train/drop_rate' in row]
  assert drops and max(drops) == 0
  assert NOTE in (folder / 'routing_report.md').read_text()
  assert (folder / 'sample.txt').read_text().startswith(f'[{NOTE}')
  # So do records of the finished run.
  workdir = f'--workdir={folder}'
  text, again = tmp_path / 'text', tmp_path / 'again'
  capsys.readouterr()
  generate.main([workdir, '--prompt=a', '--num_tokens=2', f'--trace={text}'])
  assert f'WARNING: {NOTE}' in capsys.readouterr().err
  record_evaluation.main([workdir, f'--trace={again}', '--num_batches=1'])
  for trace in (text, again):
    assert f'; {NOTE}' in traces.read(trace).header.note


@pytest.mark.slow
def test_steps_that_are_recorded_have_even_loads(run, tmp_path, capsys):
  folder, _ = run
  trace = traces.read(folder / 'trace')
  assert trace.header.note.startswith(NOTE)
  routes.main([str(folder / 'trace'), f'--output={tmp_path}'])
  assert NOTE in capsys.readouterr().out
  records = [*trace.records('train')]
  assert len(records) == 2
  for record in records:
    for row in record.layers[1].expert:
      load = np.bincount(row[row >= 0], minlength=4)
      assert load.max() - load.min() <= 1


def test_a_model_says_what_its_results_have_to():
  leaks = {'router': {'token_choice': {'slot_priority': 'batch_priority'}}}
  plain = tiny.model_of(tiny.options())
  leaking = tiny.model_of(
    tiny.options(model={'moe': {**MOE, **leaks, 'allow_future_leak': True}})
  )
  assert hooks.model_warnings(plain) == []
  assert [text[:17] for text in hooks.model_warnings(leaking)] == [
    'moe.allow_future_', 'moe.force_balance'
  ]  # fmt: skip
