"""Lines that a study prints while its runs are made."""

import time

import ml_collections
import pytest

from experiments.study import run_progress
from experiments.study.jobs import Job
from experiments.study.parts import Arm, Column
from experiments.study.run_progress import Progress
from experiments.study.scheduler import DONE
from experiments.study.workers import Call
from moe_jax.runs import metrics


@pytest.fixture
def jobs(tmp_path):
  """Two seeds of two arms, four steps each."""
  config = ml_collections.ConfigDict({'total_steps': 4})
  return [
    Job(Arm(name, {}), seed, config, tmp_path / f'{name}{seed}')
    for seed in (0, 1)
    for name in ('dense', 'sparse')
  ]


def progress_of(jobs):
  return Progress(
    {job.name: [job] for job in jobs}, Column('loss', 'loss'), 2, jobs
  )


def log(job, step, loss):
  job.workdir.mkdir(exist_ok=True)
  with (job.workdir / metrics.FILE_NAME).open('a') as file:
    file.write(f'{{"step": {step}, "train/loss": {loss}}}\n')


def test_runs_are_named_first_and_said_as_they_end(jobs, capsys):
  progress = progress_of(jobs)
  assert capsys.readouterr().out == (
    '2 at a time, 16 steps; seeds 0, 1 of the arms dense; sparse\n'
  )
  for job in (jobs[0], jobs[2]):
    progress.begins(job.name)
    job.write_result({'loss': 1.0 + job.seed})
    progress.ends(job.name, DONE, Call())
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith('[1/4] dense, seed 0: loss 1.0000; ')
  # Student's t of one degree of freedom is 12.706, times 0.5.
  assert second.startswith(
    '[2/4] dense, seed 1: loss 2.0000 (2 seeds: 1.5000 ± 6.3531); '
  )
  assert second.endswith(' left')


def test_a_running_call_is_said_with_its_step(jobs, capsys, monkeypatch):
  progress = progress_of(jobs)
  now = time.perf_counter()
  monkeypatch.setattr(time, 'perf_counter', lambda: now + 60)
  progress.begins(jobs[0].name)
  progress.begins(jobs[1].name)
  log(jobs[0], 1, 3.5)
  log(jobs[0], 2, 3.25)
  capsys.readouterr()
  progress.tick()
  # Two of sixteen steps took a minute.
  assert capsys.readouterr().out == (
    'running: dense, seed 0 at step 2 of 4, loss 3.2500; sparse, seed 0 began '
    '0.0 minutes ago; 1.0 minutes gone, 7.0 left\n'
  )


def test_the_first_steps_tell_no_time(tmp_path, capsys):
  config = ml_collections.ConfigDict({'total_steps': 100})
  job = Job(Arm('dense', {}), 0, config, tmp_path / 'dense')
  progress = progress_of([job])
  progress.begins(job.name)
  for step, is_told in ((1, False), (2, True)):
    log(job, step, 3.5)
    capsys.readouterr()
    progress.tick()
    assert (' left' in capsys.readouterr().out) == is_told


def test_lines_come_while_runs_are_made(jobs, capsys, monkeypatch):
  monkeypatch.setattr(run_progress, 'EVERY_SECONDS', 0.01)
  progress = progress_of(jobs)
  progress.begins(jobs[0].name)
  printed = ''
  with progress.ticking():
    end = time.monotonic() + 30
    while 'running: dense' not in printed and time.monotonic() < end:
      time.sleep(0.01)
      printed += capsys.readouterr().out
  assert 'running: dense, seed 0 began 0.0 minutes ago' in printed
