"""Studies: paired intervals, honest verdicts, runs that can be gone on with."""

import json
import os
import pathlib
import signal

import numpy as np
import pytest
from scipy import stats

from experiments import launch, study, switch_vs_dense
from moe_jax import command_line, host
from moe_jax.config import difference, merge
from moe_jax.training import loop
from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[1]


def test_interval_is_students():
  values = [1.30, 1.34, 1.29, 1.33]
  found = study.Interval.of(values)
  low, high = stats.t.interval(
    0.95, 3, loc=np.mean(values), scale=stats.sem(values)
  )
  np.testing.assert_allclose(found.mean - found.half_width, low)
  np.testing.assert_allclose(found.mean + found.half_width, high)
  assert f'{found:.3f}' == '1.315 ± 0.038'


@pytest.mark.parametrize(
  ('differences', 'verdict'),
  [
    ([-0.02, -0.03, -0.025], 'better'),
    ([0.02, 0.03, 0.025], 'worse'),
    ([-0.02, 0.03, -0.01], 'not resolved'),
    ([-0.02], 'not resolved'),  # one seed tells nothing
  ],
)
def test_a_verdict_needs_an_interval_without_zero(differences, verdict):
  assert study.Interval.of(differences).verdict() == verdict


def test_one_seed_has_no_width():
  assert f'{study.Interval.of([0.5]):.2f}' == '0.50 ± unknown'


def test_markdown_table():
  rows = [{'model': 'dense', 'loss': '1.3'}, {'model': 'sparse', 'loss': '1.2'}]
  assert study.markdown_table(rows).splitlines() == [
    '| model | loss |',
    '| --- | --- |',
    '| dense | 1.3 |',
    '| sparse | 1.2 |',
  ]


def test_the_arms_are_equal_in_flops():
  config = switch_vs_dense.get_config(100)
  run = {'median_step_seconds': 0.1}
  for eval_name in (switch_vs_dense.EVAL, switch_vs_dense.ROOM):
    run[f'eval/{eval_name}/loss'] = 1.5
  results = {arm.name: [run] for arm in switch_vs_dense.arms()}
  table = switch_vs_dense.make_table(config, results)
  flops = [float(row['FLOPs/token'].removesuffix('M')) for row in table]
  # All but the router's part, which is reported and not compensated.
  assert max(flops) < 1.05 * min(flops)
  assert table[0]['model'] == 'dense'
  assert {row['verdict'] for row in table[1:]} == {'not resolved'}


def study_config():
  config = tiny.config(total_steps=2, checkpoint={'every_steps': 0})
  return merge(config, {'mesh': {'data': -1}, 'batch_size': 8})


ARMS = [
  study.Arm('dense', {'model': {'moe': {'num_experts': 0}}}),
  study.Arm('sparse', {}),
]


@pytest.mark.slow
def test_a_study_runs_once_and_is_read_afterwards(tmp_path, monkeypatch):
  results = study.run_study(study_config(), ARMS, [0, 1], tmp_path)
  losses = {
    name: [run['eval/train_capacity/loss'] for run in runs]
    for name, runs in results.items()
  }
  assert len(set(losses['dense'] + losses['sparse'])) == 4

  def refuse(*args, **kwargs):
    raise AssertionError('a finished run was trained again')

  monkeypatch.setattr(study, 'train_and_evaluate', refuse)
  again = study.run_study(study_config(), ARMS, [0, 1], tmp_path)
  assert again == json.loads(json.dumps(results))


@pytest.mark.slow
def test_a_stopped_run_is_no_result(tmp_path, monkeypatch):
  train = loop.train_and_evaluate

  def stopped(config, workdir, *, hooks, **kwargs):
    class Stop(loop.Hook):
      def start(self, run):
        step = run.train_step

        def step_and_signal(state, batch):
          os.kill(os.getpid(), signal.SIGTERM)
          return step(state, batch)

        run.train_step = step_and_signal

    return train(config, workdir, hooks=[*hooks, Stop()], **kwargs)

  config = study_config()
  with monkeypatch.context() as patched:
    patched.setattr(study, 'train_and_evaluate', stopped)
    with pytest.raises(SystemExit, match='was stopped'):
      study.run_one(config, tmp_path / 'run')
  assert not (tmp_path / 'run' / study.RESULT).exists()
  assert 'eval/train_capacity/loss' in study.run_one(config, tmp_path / 'run')


def test_tuning_the_allocator_is_safe_anywhere(monkeypatch):
  assert host.keep_freed_memory() in (True, False)
  monkeypatch.setattr('sys.platform', 'darwin')
  assert host.keep_freed_memory() is False


def test_a_launched_run_is_the_studys_own(monkeypatch):
  # The study finds it in its folder, with its config, and reads its result.
  monkeypatch.chdir(ROOT)
  items = launch.read_items('experiments/switch_vs_dense.py')
  launch.check(items)
  config = switch_vs_dense.get_config()
  own = {
    f'{switch_vs_dense.OUTPUT}/runs/{arm.name}/seed{seed}': merge(
      config, {'seed': seed, **arm.overrides}
    )
    for seed in range(3)
    for arm in switch_vs_dense.arms()
  }
  assert {item.workdir for item in items} == own.keys()
  for item in items[2:6]:
    found = command_line.config_of(item.config, item.flags())
    assert not difference(found, own[item.workdir])
