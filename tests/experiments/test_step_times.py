"""Step times, their bursts, and runs that share their first steps."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from experiments import switch_speed
from experiments.benchmarks.roofline import Peaks
from experiments.study import command, runner, times
from experiments.study.annealed import AnnealedRunner, Branch
from experiments.study.jobs import Job, config_hash, jobs_of
from experiments.study.parts import Arm
from experiments.study.results import SUMMARY
from experiments.study.runner import train
from experiments.study.times import Burst, StepTime
from experiments.switch_speed import DENSE, SPARSE, TRIAL, arm_name, reached_at
from moe_jax.run_config import RunConfig
from moe_jax.runs.metrics import FILE_NAME, read_metrics
from moe_jax.runs.workdir import CHECKPOINTS
from tests.training import tiny


@pytest.fixture
def _quick_bursts(monkeypatch):
  """Bursts take no time, in this process, whatever else the machine does."""
  effort = {'steps': 1, 'seconds': 0.01, 'quick': True}
  monkeypatch.setattr(times, '_EFFORT', effort)
  # Nothing that other processes use is too much.
  monkeypatch.setattr(times.os, 'cpu_count', lambda: 100)
  monkeypatch.setattr(
    times, '_fresh', lambda configs: times.measured(configs, **effort)
  )


@pytest.mark.slow
@pytest.mark.usefixtures('_quick_bursts')
def test_bursts_are_kept_and_those_of_a_busy_machine_made_up_for(
  tmp_path, monkeypatch
):
  model = {'num_layers': 1, 'moe': {'layers': 'all'}}
  shared = tiny.config(batch_size=8, mesh={'data': -1}, model=model)
  arms = [Arm('dense', {'model.moe.num_experts': 0}), Arm('sparse', {})]
  jobs = jobs_of(RunConfig, shared, arms, [3], tmp_path)
  groups = [['dense', 'another', 'sparse']]
  # Bursts belong to the programs of their steps, which are traced once here.
  digest, digests = times.program_digest, {}
  dense, sparse = (
    digests.setdefault(id(job.config), digest(job.config)) for job in jobs
  )
  assert digest(jobs[0].config) == dense != sparse
  monkeypatch.setattr(
    times, 'program_digest', lambda config: digests[id(config)]
  )
  first = times.step_times(groups, jobs, tmp_path)
  assert list(first) == ['dense', 'sparse'] and first['dense'] == 1.0
  assert first['sparse'].seconds[0] > 0 and len(first['sparse'].ratios) == 1
  (path,) = tmp_path.glob('step_bursts-*.json')

  def stored_bursts():
    return json.loads(path.read_text())

  def write_others(others):
    """Writes what other processes used in each burst to the file."""
    bursts = [
      {**burst, 'others': used}
      for burst, used in zip(stored_bursts(), others, strict=True)
    ]
    path.write_text(json.dumps(bursts))

  # Another burst is measured for a busy one, and the less disturbed is taken.
  write_others([10.0])
  again = times.step_times(groups, jobs, tmp_path)
  assert len(stored_bursts()) == 2 and again['sparse'].others < 5
  assert len(again['sparse'].ratios) == 1
  monkeypatch.setattr(times, 'measured', None)
  # On a machine that stays busy three are enough.
  path.write_text(json.dumps([*stored_bursts(), stored_bursts()[0]]))
  write_others([10.0, 8.0, 9.0])
  busy = times.step_times(groups, jobs, tmp_path)
  assert busy['sparse'].others == 8.0


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
  monkeypatch.setattr(times.os, 'cpu_count', lambda: 2)
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
  assert times.describe({'top 1': time}).endswith('the machine was BUSY.')
  quiet = StepTime.of('top 1', 'dense', bursts[:1])
  text = times.describe({'top 1': time, 'quiet': quiet})
  assert text.endswith('was BUSY for top 1.')
  quiet.others = float('nan')
  assert 'BUSY' not in times.describe({'quiet': quiet})


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
@pytest.mark.usefixtures('_quick_bursts')
def test_the_command_searches_runs_and_times(tmp_path, monkeypatch):
  # The programs of steps, which digests are made of, are not traced for them.
  monkeypatch.setattr(times, 'program_digest', config_hash)
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
  monkeypatch.setattr(times, 'measured', None)
  monkeypatch.setattr(runner, 'train_and_evaluate', None)
  assert command.main(study, argv) == folder


def annealed_jobs(output, lengths, **overrides) -> list[Job]:
  """A run of each length, annealed over its last two fifths."""
  shared = tiny.config(
    batch_size=8,
    mesh={'data': -1},
    model=tiny.ONE_LAYER,
    checkpoint={'every_steps': 0},
    optimizer={'schedule': {'kind': 'trapezoid', 'decay_fraction': 0.4}},
  )
  arms = [
    Arm(f'{n}', {'total_steps': n, **overrides}, 'a line', n) for n in lengths
  ]
  return jobs_of(RunConfig, shared, arms, [0], output)


def test_runs_of_one_line_and_seed_are_made_together():
  short, long = annealed_jobs(pathlib.Path('x'), (5, 10))
  other = dataclasses.replace(long, seed=1)
  calls = [AnnealedRunner().together(job) for job in (short, long, other)]
  assert calls == ['a line, seed 0', 'a line, seed 0', 'a line, seed 1']


@pytest.mark.parametrize(
  ('target', 'losses', 'length'),
  [
    # Half of the loss between 0.25 and 1 is half of the way in logarithms.
    (1.5, [2.0, 1.0], 0.5),
    # Nothing is extrapolated beyond the ends.
    (2.5, [2.0, 1.0], 0.25),
    (0.5, [2.0, 1.0], 1.0),
    # The longer run is the worse one, or one of the two diverged.
    (1.5, [2.0, 2.5], 1.0),
    (2.2, [2.0, 2.5], 0.25),
    (1.5, [float('nan'), 1.0], 1.0),
    (2.2, [2.0, float('nan')], 0.25),
  ],
)
def test_the_length_at_which_a_loss_is_reached(target, losses, length):
  reached_length = reached_at(target, [0.25, 1.0], losses)
  np.testing.assert_allclose(reached_length, length)


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    ({'optimizer.learning_rate': 0.5}, 'differ in total_steps=5 and 10 alone'),
    (
      {'optimizer.schedule.kind': 'cosine'},
      "Cosine; runs share .* 'trapezoid'",
    ),
    # A hundred steps are cut to half of the run, which differs.
    ({'optimizer.schedule.warmup_steps': 100}, r'warm-ups have \[2, 5\] steps'),
  ],
)
def test_what_differs_in_more_than_its_length_is_refused(other, message):
  is_alone = 'optimizer.learning_rate' in other  # only the longer run has it
  (short,) = annealed_jobs(
    pathlib.Path('x'), [5], **({} if is_alone else other)
  )
  (long,) = annealed_jobs(pathlib.Path('x'), [10], **other)
  with pytest.raises(ValueError, match=message):
    Branch(short, long)


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_shorter_one_is_the_same_run(tmp_path):
  (alone,) = annealed_jobs(tmp_path / 'alone', [10])
  train(alone)
  joint_jobs = annealed_jobs(tmp_path / 'together', (10, 5))
  AnnealedRunner()(joint_jobs)
  long, short = (job.result() for job in joint_jobs)
  key = 'eval/train_capacity/loss'
  # Eight devices add in no fixed order; a single one gives the same bits.
  np.testing.assert_allclose(long[key], alone.result()[key], rtol=1e-6)
  assert abs(short[key] - long[key]) > 1e-3
  # The shorter run takes three steps before it decays, the longer none of them.
  rows = read_metrics(joint_jobs[0].workdir / FILE_NAME)
  assert min(row['step'] for row in rows) == 4
  # A shorter run that is made again leaves the longer one as it is.
  again = annealed_jobs(tmp_path / 'together', (10, 5))
  shutil.rmtree(again[1].workdir)
  AnnealedRunner()(again)
  assert again[0].result() == long
  assert not (again[0].workdir / CHECKPOINTS).exists()
