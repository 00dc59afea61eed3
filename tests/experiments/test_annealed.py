"""Runs that share their first steps are the runs of their own configs."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from experiments.study.annealed import AnnealedRunner, Branch
from experiments.study.jobs import Job, jobs_of
from experiments.study.parts import Arm
from experiments.study.runner import train
from experiments.switch_speed import reached_at
from moe_jax.run_config import RunConfig
from moe_jax.runs.metrics import FILE_NAME, read_metrics
from moe_jax.runs.workdir import CHECKPOINTS
from tests.training import tiny


def jobs(output, lengths, **overrides) -> list[Job]:
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
  short, long = jobs(pathlib.Path('x'), (5, 10))
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
  (short,) = jobs(pathlib.Path('x'), [5], **({} if is_alone else other))
  (long,) = jobs(pathlib.Path('x'), [10], **other)
  with pytest.raises(ValueError, match=message):
    Branch(short, long)


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_shorter_one_is_the_same_run(tmp_path):
  (alone,) = jobs(tmp_path / 'alone', [10])
  train(alone)
  joint_jobs = jobs(tmp_path / 'together', (10, 5))
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
  again = jobs(tmp_path / 'together', (10, 5))
  shutil.rmtree(again[1].workdir)
  AnnealedRunner()(again)
  assert again[0].result() == long
  assert not (again[0].workdir / CHECKPOINTS).exists()
