"""Rates are chosen by the written rule, and seconds hold both errors."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import switch_speed
from experiments.benchmarks.roofline import Peaks
from experiments.study import command, jobs, runner
from experiments.study import times as times_lib
from experiments.study.results import SUMMARY
from experiments.study.times import Burst, StepTime
from experiments.switch_speed import DENSE, SPARSE, TRIAL, arm_name
from tests.training import tiny

PEAKS = Peaks(200e9, 20e9, 'float32', 1024, 1 << 28)
EIGHT, _, SECOND_LAYERS = SPARSE
STUDY = switch_speed.STUDY


def result(loss: float, rate: float = 4e-3) -> dict[str, float]:
  """The result of a run with what rows read; experts have 16 of 40 GFLOP."""
  return {
    switch_speed.LOSS.key: loss,
    'eval/main/loss': loss + 0.01,
    'train/drop_rate': 0.25,
    'learning_rate': rate,
    'step/flops': 24e9,
    'step/expert_flops': 16e9,
    'step/optimizer_bytes': 1e9,
  }


def burst(others: float = 0.0, **seconds: list[float]) -> Burst:
  """A burst of rounds, by name with _ in place of spaces."""
  return Burst(
    {k.replace('_', ' '): v for k, v in seconds.items()},
    PEAKS,
    others,
    '2026-02-02 10:00 UTC' if others else '2026-02-01 10:00 UTC',
  )


def test_a_step_time_is_told(monkeypatch):
  monkeypatch.setattr(times_lib.os, 'cpu_count', lambda: 2)
  bursts = [
    burst(dense=[1.0, 2.0, 4.0], top_1=[1.5, 2.0, 8.0]),
    burst(0.3, dense=[2.0, 2.0, 2.0], top_1=[2.2, 2.6, 2.4]),
  ]
  time = StepTime.of('top 1', 'dense', bursts)
  np.testing.assert_allclose(time.ratios, [1.5, 1.2])
  np.testing.assert_allclose(time.seconds, [2.0, 2.4])
  # The rounds' ratios are 1, 1.1, 1.2, 1.3, 1.5 and 2.
  np.testing.assert_allclose(time, 1.25)
  assert time.others == 0.3
  assert times_lib.describe({'top 1': time}).endswith('the machine was BUSY.')
  quiet = StepTime.of('top 1', 'dense', bursts[:1])
  text = times_lib.describe({'top 1': time, 'quiet': quiet})
  assert text.endswith('was BUSY for top 1.')
  quiet.others = float('nan')
  assert 'BUSY' not in times_lib.describe({'quiet': quiet})


def test_every_model_has_the_best_of_the_same_rates():
  preset = STUDY.presets['full']
  (stage,) = STUDY.explorations(preset)
  arms = STUDY.arms_of(preset)
  trials = stage.arms(arms, None)
  steps = [arm.overrides['total_steps'] for arm in trials]
  # The twin is tried at the length of its reported runs.
  assert steps == [preset.steps] * 3 + [round(0.3 * preset.steps)] * 3
  best = {DENSE: 2e-3, SECOND_LAYERS: 8e-3}
  results = {}
  for model, rate in best.items():
    for other in switch_speed.RATES:
      # A run that diverged is no best one.
      worse = float('nan') if other == 2e-3 else 1.5
      name = arm_name(model, TRIAL[model], other)
      results[name] = [result(1.0 if other == rate else worse)]
  assert results.keys() == {arm.name for arm in trials}
  chosen = stage.chosen(arms, results, {})
  key = 'optimizer.learning_rate'
  assert [arm.overrides[key] for arm in chosen] == [2e-3, 8e-3, 8e-3, 8e-3]
  assert [arm.name for arm in chosen] == [arm.name for arm in arms]
  # The quick preset leaves a rate out.
  quick = STUDY.presets['quick']
  (stage,) = STUDY.explorations(quick)
  trials = stage.arms(STUDY.arms_of(quick), None)
  assert {arm.overrides[key] for arm in trials} == {2e-3, 4e-3}


def test_seconds_of_a_seed_are_its_steps_times_the_time_of_its_burst():
  dense, arms = arm_name(DENSE), arm_name(EIGHT)
  results = {dense: [result(1.5), result(1.25)]}
  for length, loss in ((0.5, 2.0), (1.0, 1.0)):
    sparse = result(loss) | {'step/optimizer_bytes': 2e9}
    results[arm_name(EIGHT, length)] = [sparse, sparse]
  bursts = [
    Burst({dense: [0.5], arms: [0.6]}, PEAKS, 0.0, ''),
    Burst({dense: [0.5], arms: [0.65]}, PEAKS, 0.0, ''),
  ]
  times = {n: StepTime.of(n, dense, bursts) for n in (dense, arms)}
  twin, row, first = switch_speed.rows(results, times)
  # Half of the loss between 0.5 and 1 is half of the way in logarithms.
  steps = [0.5**0.5, 0.5**0.25]
  np.testing.assert_allclose(row.values[switch_speed.STEPS], steps)
  np.testing.assert_allclose(row.values[switch_speed.TIME], [1.2, 1.3])
  seconds = [1.2 * steps[0], 1.3 * steps[1]]
  np.testing.assert_allclose(row.values[switch_speed.SECONDS], seconds)
  np.testing.assert_allclose(twin.values[switch_speed.MS], [500, 500])
  # A quarter of the choices is dropped: 0.18 s of products, and 0.05 or 0.1 s
  # of the optimizer, over the twin's 0.5 s.
  np.testing.assert_allclose(twin.values[switch_speed.FLOOR], [0.46, 0.46])
  np.testing.assert_allclose(row.values[switch_speed.FLOOR], [0.56, 0.56])
  expected = [0.56 * share for share in steps]
  np.testing.assert_allclose(row.values[switch_speed.LEAST], expected)
  assert (first.name, first.values) == (switch_speed.FIRST, row.values)


def test_seeds_beyond_the_ends_of_the_lengths_are_counted():
  results = {arm_name(DENSE): [result(x) for x in (2.5, 1.5, 1)]}
  for length, loss in ((0.5, 2.0), (1.0, 1.2)):
    results[arm_name(EIGHT, length)] = [result(loss)] * 3
  text = switch_speed.remarks(results)
  assert f'Of 3 seeds of {EIGHT} 1 have' in text and '1 have it not' in text


SMALL = {
  'batch_size': 8,
  'data.seq_len': 16,
  'data.source.python_stdlib.modules': tiny.MODULES,
  'model.num_layers': 1,
  'model.moe.group_size': 16,
  **{
    f'evals.{name}.num_batches': 2 for name in ('main', switch_speed.NO_DROPS)
  },
}


@pytest.mark.slow
def test_the_command_searches_runs_and_times(tmp_path, monkeypatch):
  effort = {'steps': 1, 'seconds': 0.01, 'quick': True}
  monkeypatch.setattr(times_lib, '_EFFORT', effort)
  # Nothing that other processes use is too much, and a process is enough.
  monkeypatch.setattr(times_lib.os, 'cpu_count', lambda: 100)
  monkeypatch.setattr(
    times_lib, '_fresh', lambda configs: times_lib.measured(configs, **effort)
  )
  # The programs of steps, which digests are made of, are not traced for them.
  monkeypatch.setattr(times_lib, 'program_digest', jobs.config_hash)
  preset = switch_speed.SpeedPreset(
    10, 1, SMALL, without=['*every 2nd*', '*of 16*', '*0.[57] *'], rates=(4e-3,)
  )
  study = dataclasses.replace(STUDY, presets={'full': preset})
  argv = ['--workers=1', f'--output={tmp_path}', '--config.mesh.data=-1']
  folder = command.main(study, argv)
  summary = json.loads((folder / SUMMARY).read_text())
  names = [row['name'] for row in summary['rows']]
  assert names == [DENSE, EIGHT, switch_speed.FIRST]
  values = summary['rows'][1]['values']
  assert values[switch_speed.TIME][0] > 0 and values[switch_speed.FLOOR][0] > 0
  assert values[switch_speed.RATE.name] == [4e-3]
  assert len(summary['claims']) == 5 and ' 1 burst on ' in summary['timing']
  # The same command makes and times nothing again.
  monkeypatch.setattr(times_lib, 'measured', None)
  monkeypatch.setattr(runner, 'train_and_evaluate', None)
  assert command.main(study, argv) == folder
