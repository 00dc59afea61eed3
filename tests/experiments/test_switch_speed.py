"""Models are chosen by the written rule, and seconds hold both errors."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import report, switch_speed
from experiments.benchmarks import timing
from experiments.benchmarks.roofline import Peaks
from experiments.study import command, jobs, runner
from experiments.study import times as times_lib
from experiments.study.results import SUMMARY
from experiments.study.times import Burst, StepTime
from experiments.time_to_loss import speed_models
from experiments.time_to_loss.speed_models import (
  SpeedModel,
  SpeedPreset,
  arm_name,
)
from tests.training import tiny

PEAKS = Peaks(200e9, 20e9, 'float32', 1024, 1 << 28)
FOUR = SpeedModel(128, 4, 1, 'capacity 1')
EIGHT = SpeedModel(128, 8, 2, 'dropless', 'every 2')
WIDE = SpeedModel(256, 4, 1, 'capacity 1')
RATES = (1e-3, 2e-3, 4e-3)
PRESET = SpeedPreset(1000, 2, models=(FOUR, EIGHT, WIDE), most=2, rates=RATES)


def result(loss: float, rate: float = 4e-3) -> dict[str, float]:
  """The result of a run with what rows read; experts have 16 of 40 GFLOP."""
  return {
    speed_models.LOSS.key: loss,
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
  assert isinstance(time.spread, timing.Spread) and time.others == 0.3
  text = times_lib.describe({'top 1': time})
  assert '2 bursts on 2026-02-01 and 2026-02-02, in which' in text
  assert 'at most 0.30 of' in text and text.endswith('the machine was BUSY.')
  quiet = StepTime.of('top 1', 'dense', bursts[:1])
  text = times_lib.describe({'top 1': time, 'quiet': quiet})
  assert '1 or 2 bursts' in text and text.endswith('was BUSY for top 1.')
  assert 'BUSY' not in times_lib.describe({'quiet': quiet})
  quiet.others = float('nan')
  text = times_lib.describe({'quiet': quiet})
  assert 'an unknown number of' in text and 'BUSY' not in text


def test_names_of_arms_are_read_back():
  for model in (FOUR, EIGHT, WIDE.twin):
    for rate in (0.0, 2e-3):
      arm = model.arm(PRESET, 0.7, rate)
      assert speed_models.parsed(arm.name) == (model.name, 0.7, rate)
      assert arm.overrides['total_steps'] == 700
  assert speed_models.twin_of(EIGHT.name) == EIGHT.twin.name
  with pytest.raises(ValueError, match="'dense' is not the name of an arm"):
    speed_models.parsed('dense')


def test_arms_are_timed_beside_the_twin_of_their_width():
  models = (FOUR, WIDE, WIDE.twin, FOUR.twin)
  arms = [m.arm(PRESET, x) for m in models for x in (0.5, 1.0)]
  assert speed_models.groups(arms) == [
    [arm_name(FOUR.twin.name, 1.0), arm_name(FOUR.name, 1.0)],
    [arm_name(WIDE.twin.name, 1.0), arm_name(WIDE.name, 1.0)],
  ]


def screened(model: SpeedModel, loss: float, time: float):
  """The trial of a model: its result and its step time."""
  rate = speed_models.SCREENED_RATE[model.width]
  name = model.arm(PRESET, PRESET.trial, rate).name
  return {name: [result(loss, rate)]}, {name: time}


def test_the_screening_chooses_by_predicted_seconds():
  stage = speed_models.screen(PRESET)
  trials = stage.arms([], None)
  assert [arm.x for arm in trials] == [0.3, 0.6, 0.3, 0.6, 0.3, 0.3, 0.3]
  # With twice the steps both twins go from 2 to 1.
  results = {
    arm.name: [result(2.0 if arm.x == 0.3 else 1.0)] for arm in trials[:4]
  }
  times = {}
  for model, loss, time in (
    (FOUR, 1.0, 1.2),  # half of the steps
    (EIGHT, 1.5, 1.1),  # 1 / sqrt(2)
    (WIDE, 3.0, 1.0),  # twice the steps
  ):
    trial, trial_time = screened(model, loss, time)
    results |= trial
    times |= trial_time
  predictions = speed_models.predictions(results, times)
  np.testing.assert_allclose(
    [predictions[m.name].seconds for m in (FOUR, EIGHT, WIDE)],
    [0.6, 1.1 / np.sqrt(2), 2.0],
  )
  twins = [m.twin.arm(PRESET, 1.0) for m in (FOUR, WIDE)]
  arms = [*twins, *(m.arm(PRESET, 0.5) for m in (WIDE, EIGHT, FOUR))]
  chosen = stage.chosen(arms, results, times)
  assert [arm.line for arm in chosen] == [
    m.name for m in (FOUR.twin, FOUR, EIGHT)
  ]
  # Models of another width are screened only, however good they are.
  trial, trial_time = screened(WIDE, 0.5, 1.0)
  again = stage.chosen(arms, {**results, **trial}, {**times, **trial_time})
  assert again == chosen


def test_every_model_has_the_best_of_the_same_rates():
  stage = speed_models.search_rates(PRESET)
  arms = [FOUR.twin.arm(PRESET, 1.0), FOUR.arm(PRESET, 0.5)]
  trials = stage.arms(arms, None)
  # The twin is tried at the length of its reported runs.
  assert [arm.x for arm in trials] == [1.0] * 3 + [PRESET.trial] * 3
  assert trials[0].overrides['total_steps'] == 1000
  best = {FOUR.twin.name: 1e-3, FOUR.name: 4e-3}
  results = {}
  for arm in trials:
    model, _, rate = speed_models.parsed(arm.name)
    # A run that diverged is no best one.
    other = float('nan') if rate == 1e-3 else 1.5
    results[arm.name] = [result(1.0 if rate == best[model] else other)]
  chosen = stage.chosen(arms, results, {})
  key = 'optimizer.learning_rate'
  assert [arm.overrides[key] for arm in chosen] == [1e-3, 4e-3]
  assert [arm.name for arm in chosen] == [arm.name for arm in arms]
  # A screened trial at one of the rates is the same run.
  again = FOUR.arm(PRESET, PRESET.trial, 4e-3)
  assert again in trials
  text = switch_speed.remarks({**results, **{a.name: [] for a in arms}})
  assert 'searched among 0.001, 0.002, 0.004, on a seed' in text
  assert f'at an end of these for {FOUR.twin.name}; {FOUR.name}' in text
  assert f'The first choice is {FOUR.name}.' in text
  assert 'Not run: width 128, all layers, dropless; width' in text
  assert 'capacity 1: top-1 of 8, 1 of 16, 1 of 32, 2 of 4, 2 of 8' in text


def test_seconds_of_a_seed_are_its_steps_times_the_time_of_its_burst():
  dense, arms = arm_name(FOUR.twin.name, 1.0), FOUR.arm(PRESET, 1.0).name
  results = {dense: [result(1.5), result(1.25)]}
  for length, loss in ((0.25, 2.0), (1.0, 1.0)):
    sparse = result(loss) | {'step/optimizer_bytes': 2e9}
    results[arm_name(FOUR.name, length)] = [sparse, sparse]
  bursts = [
    Burst({dense: [0.5], arms: [0.6]}, PEAKS, 0.0, ''),
    Burst({dense: [0.5], arms: [0.65]}, PEAKS, 0.0, ''),
  ]
  times = {n: StepTime.of(n, dense, bursts) for n in (dense, arms)}
  twin, row, first = switch_speed.rows(results, times)
  # Half of the loss between 0.25 and 1 is half of the way in logarithms.
  steps = [0.5, 0.5 * np.sqrt(2)]
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
  names = [arm_name(FOUR.name, length) for length in (0.25, 1.0)]
  results = {arm_name(FOUR.twin.name, 1.0): [result(x) for x in (2.5, 1.5, 1)]}
  for name, loss in zip(names, (2.0, 1.2), strict=True):
    results[name] = [result(loss)] * 3
  text = switch_speed.remarks(results)
  assert f'1 of 3 seeds of {FOUR.name} have the dense loss at the sh' in text
  assert f'1 of 3 seeds of {FOUR.name} have not reached the dense loss' in text


def test_all_lengths_have_one_warm_up():
  study = switch_speed.STUDY
  for preset in study.presets.values():
    shared = study.shared(preset)
    warmup = shared.optimizer.schedule.warmup_steps
    assert 0 < 2 * warmup <= preset.trial * preset.steps
    models = [m.name for m in preset.models]
    assert len(models) == len(set(models))
    assert set(preset.models) <= set(speed_models.GRID)
    assert list(preset.lengths) == sorted({*preset.lengths, 1.0})


def test_runs_that_a_search_chooses_are_no_items():
  with pytest.raises(ValueError, match='switch_speed are chosen by other runs'):
    switch_speed.get_items('long')


def test_a_long_result_takes_the_place_of_a_full_one(tmp_path):
  for path in ('a/full', 'a/long', 'b/full', 'c/quick'):
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / path / 'summary.json').write_text('{}')
  folders = report.summaries_of(tmp_path)
  assert {k: v.parent.name for k, v in folders.items()} == {
    'a': 'long', 'b': 'full'
  }  # fmt: skip


SMALL = {
  'batch_size': 8,
  'data.seq_len': 16,
  'data.source.python_stdlib.modules': tiny.MODULES,
  'model.num_layers': 1,
  'model.moe.group_size': 16,
  **{
    f'evals.{name}.num_batches': 2 for name in ('main', speed_models.NO_DROPS)
  },
}


@pytest.mark.slow
def test_the_command_screens_searches_runs_and_times(tmp_path, monkeypatch):
  effort = {'steps': 1, 'seconds': 0.01, 'quick': True}
  monkeypatch.setattr(times_lib, '_EFFORT', effort)
  # Nothing that other processes use is too much, and a process is enough.
  monkeypatch.setattr(times_lib.os, 'cpu_count', lambda: 100)
  monkeypatch.setattr(
    times_lib,
    '_fresh',
    lambda configs: times_lib.measured(configs, **effort),
  )
  # The programs of steps, which digests are made of, are not traced for them.
  monkeypatch.setattr(times_lib, 'program_digest', jobs.config_hash)
  # The trials of the screening are those of the search of rates.
  preset = SpeedPreset(
    10,
    1,
    SMALL,
    models=[FOUR],
    most=1,
    rates=(4e-3,),
    trial=0.5,
    lengths=(1.0,),
  )
  study = dataclasses.replace(switch_speed.STUDY, presets={'full': preset})
  argv = ['--workers=1', f'--output={tmp_path}', '--config.mesh.data=-1']
  folder = command.main(study, argv)
  summary = json.loads((folder / SUMMARY).read_text())
  names = [row['name'] for row in summary['rows']]
  assert names == [FOUR.twin.name, FOUR.name, switch_speed.FIRST]
  values = summary['rows'][1]['values']
  assert values[switch_speed.TIME][0] > 0 and values[switch_speed.FLOOR][0] > 0
  assert values[switch_speed.RATE.name] == [4e-3]
  assert len(summary['claims']) == 5 and ' 1 burst on ' in summary['timing']
  # The same command makes and times nothing again.
  monkeypatch.setattr(times_lib, 'measured', None)
  monkeypatch.setattr(runner, 'train_and_evaluate', None)
  assert command.main(study, argv) == folder
