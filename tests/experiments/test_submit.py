"""Runs of a study: submitted, said, failed, repeated, stopped, gone on with."""

import dataclasses
import os
import signal
import threading
import time

import pytest

from experiments.study import command, jobs, runner, submit
from experiments.study.executors import Where
from experiments.study.jobs import RESULT
from experiments.study.parts import Arm, Column
from moe_jax import cli
from moe_jax.run_config import RunConfig
from tests import programs, tiny_study
from tests.training import tiny

LOSS = Column('loss', 'loss')


@dataclasses.dataclass(frozen=True)
class Scripted(runner.Runner):
  """Makes runs whose behaviour the name of their arm tells."""

  options = RunConfig

  def __call__(self, jobs):
    for job in jobs:
      if job.arm.name == 'bad':
        raise RuntimeError('seven slots')
      if job.arm.name == 'killed' and not job.seed:
        os.kill(os.getpid(), signal.SIGKILL)
      if job.arm.name == 'stopped':
        raise SystemExit(cli.STOPPED)
      if job.arm.name == 'long':
        time.sleep(2)
      job.write_result({'loss': 1.0 + job.seed, 'data_digest': 'x'})


def jobs_of(tmp_path, names):
  """Two seeds of arms of these names, whose runs have six steps."""
  shared, arms = tiny.config(), [Arm(name, {}) for name in names]
  return jobs.jobs_of(RunConfig, shared, arms, [0, 1], tmp_path / 'study')


def failures_of(tmp_path, names, workers):
  all_jobs = jobs_of(tmp_path, names)
  words = ['python', '-m', 'experiments.study']
  with pytest.raises(ValueError, match=r'runs failed; see .*log\.txt') as error:
    submit.run_all(Scripted(), all_jobs, LOSS, Where(workers=workers), words)
  return all_jobs, str(error.value)


def test_a_run_that_fails_is_said_and_stops_no_other(tmp_path, capsys):
  all_jobs, error = failures_of(tmp_path, ['bad', 'good'], workers=1)
  assert [job.is_finished for job in all_jobs] == [False, True] * 2
  assert '2 runs failed' in error and str(all_jobs[0].workdir) in error
  text = capsys.readouterr().out
  assert 'bad, seed 0: failed' in text and 'seven slots' in text
  assert "python -m experiments.study '--only=bad, seed 0'\n" in text
  steps = 4 * all_jobs[0].config.total_steps
  assert (
    f'1 at a time, {steps} steps; seeds 0, 1 of the arms bad; good\n' in text
  )
  # Student's t of one degree of freedom is 12.706, times 0.5.
  assert '[4/4] good, seed 1: loss 2.0000 (2 seeds: 1.5000 ± 6.3531);' in text


@pytest.mark.slow
def test_a_worker_that_is_lost_has_a_successor(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(submit, 'EVERY_SECONDS', 0.01)
  all_jobs, error = failures_of(tmp_path, ['killed', 'good', 'fine'], workers=2)
  assert [job.is_finished for job in all_jobs] == [False] + [True] * 5
  assert '1 runs failed' in error
  text = capsys.readouterr().out
  assert 'terminated abruptly' in text
  assert 'running: killed, seed 0; good, seed 0; 0.0 minutes gone\n' in text


def test_runs_go_on_no_further_where_one_is_stopped(tmp_path):
  all_jobs = jobs_of(tmp_path, ['good', 'stopped', 'later'])
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit, match=str(cli.STOPPED)):
    submit.run_all(Scripted(), all_jobs, LOSS, Where(workers=1))
  assert [job.is_finished for job in all_jobs] == [True] + [False] * 5
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_run_end_and_begins_no_other(tmp_path, number):
  all_jobs = jobs_of(tmp_path, ['long'])
  timer = threading.Timer(1.0, os.kill, [os.getpid(), number])
  # A shell lets a job in the background ignore Ctrl-C.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  timer.start()
  with pytest.raises(SystemExit, match=str(cli.STOPPED)):
    submit.run_all(Scripted(), all_jobs, LOSS, Where(workers=1))
  timer.join()
  signal.signal(signal.SIGINT, before)
  assert [job.is_finished for job in all_jobs] == [True, False]


def test_results_of_other_data_are_not_mixed(tmp_path):
  all_jobs = jobs_of(tmp_path, ['a'])
  for job, digest in zip(all_jobs, ['one', 'two'], strict=True):
    job.write_result({'loss': 1.0, 'data_digest': digest})
  with pytest.raises(ValueError, match=r"different data: sha256 \['one', 'two"):
    submit.read_all(all_jobs)


def test_one_run_is_made_alone(tmp_path, capsys):
  study = dataclasses.replace(tiny_study.DENSE, runner=Scripted())
  argv = ['--workers=1', f'--output={tmp_path}']
  with pytest.raises(SystemExit, match='0'):
    command.main(study, [*argv, '--only=fast, seed 1'])
  (result,) = tmp_path.glob(f'*/runs/*/*/{RESULT}')
  assert result.parent.parent.name == 'fast'
  with pytest.raises(SystemExit):
    command.main(study, [*argv, '--only=fat, seed 1'])
  error = capsys.readouterr().err
  assert "'fat, seed 1'" in error and "'fast, seed 1'" in error
  assert len([*tmp_path.glob(f'*/runs/*/*/{RESULT}')]) == 1


@pytest.mark.slow
@pytest.mark.parametrize('executor', ['pool', 'submitit'])
def test_a_study_that_is_stopped_or_killed_gives_the_same_table(
  tmp_path, executor
):
  if executor == 'submitit':
    pytest.importorskip('submitit')
  folder = tmp_path / 'disturbed'
  argv = ['-m', 'tests.tiny_study', '--workers=2']
  argv += [f'--executor={executor}', f'--output={folder}']

  def runs():
    paths = (folder / tiny_study.DENSE.name / 'runs').glob(f'*/*/{RESULT}')
    return {path: path.stat().st_mtime_ns for path in paths}

  env = {'JAX_PLATFORMS': 'cpu'}
  # One study is killed, then stopped, then goes on to its end. Jobs of a
  # cluster outlive a study that is killed, so there it is only stopped.
  finished = {}
  ends = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: cli.STOPPED}
  if executor == 'submitit':
    del ends[signal.SIGKILL]
  for number, status in ends.items():
    process = programs.started(*argv, env=env, stderr=None)
    deadline = time.monotonic() + 300
    while len(runs()) == len(finished):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=120) == status
    time.sleep(2)  # workers of a killed process notice
    before, finished = finished, runs()
    assert len(finished) < 6
    # Runs that were finished are not made again.
    assert {path: finished[path] for path in before} == before
  output = programs.run(*argv, env=env).stdout
  assert f'6 runs, {len(finished)} of them there' in output
  assert {path: runs()[path] for path in finished} == finished
  undisturbed = tmp_path / 'undisturbed'
  argv = [*argv[:2], '--workers=1', f'--output={undisturbed}']
  assert programs.run(*argv, env=env).returncode == 0
  tables = {
    (path / tiny_study.DENSE.name / 'quick' / 'rows.csv').read_text()
    for path in (folder, undisturbed)
  }
  assert len(tables) == 1
  assert len(tables.pop().splitlines()) == 1 + 3 * 2
