"""Several processes over Gloo on this machine, with fake devices."""

import json
import pathlib
import re
import shutil
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe_jax import data
from moe_jax.analysis import traces
from moe_jax.runs import metrics
from moe_jax.training import loop, setup
from tests import programs
from tests.training import process, tiny

pytestmark = pytest.mark.slow
TIMEOUT = process.TIMEOUTS['heartbeat_timeout_seconds']
STEPS = {
  'total_steps': 3,
  'batch_size': 16,
  'log_every_steps': 1,
  'mesh': {'data': 8},
  'model': {'num_layers': 1, 'moe': {'layers': 'all'}},
  'checkpoint': {'every_steps': 1, 'keep_newest': 99},
}
LONG = {**STEPS, 'total_steps': 40}
# Runs that end early have a model that compiles in no time.
SMALL = {**LONG, 'model': tiny.ONE_LAYER}
ACROSS = {**LONG, 'mesh': {'data': 2, 'expert': 2, 'tensor': 2}}


class Ended(NamedTuple):
  """The end of a process: its status, output and results."""

  status: int
  output: str
  errors: str
  results: list[dict]


def start(folder, count, jobs, frozen=None, **spec):
  """Runs jobs in several processes, and ends every one of them.

  The end of the process with number `frozen` is not waited for.

  Returns:
    The ends of the processes, and the seconds between the first and the last.
  """
  path = folder / 'jobs.json'
  path.write_text(json.dumps({'devices': 8 // count, 'jobs': jobs, **spec}))
  server = f'127.0.0.1:{programs.free_port()}'
  command = ['-m', 'tests.training.process', server, count]
  env, running = {'JAX_PLATFORMS': 'cpu'}, []
  try:
    for i in range(count):
      streams = [(folder / f'{i}.{name}').open('w') for name in ('out', 'err')]
      with streams[0] as out, streams[1] as err:
        running.append(
          programs.started(*command, i, path, env=env, stdout=out, stderr=err)
        )
    seconds = _wait([p for i, p in enumerate(running) if i != frozen])
  finally:
    for p in running:
      p.kill()
      p.wait()
  ends = [
    Ended(
      p.returncode,
      (folder / f'{i}.out').read_text(),
      (folder / f'{i}.err').read_text(),
      results(path, i),
    )
    for i, p in enumerate(running)
  ]
  return ends, seconds


def _wait(running):
  """Waits until all processes have ended."""
  began, first = time.monotonic(), None
  while any(p.poll() is None for p in running):
    now = time.monotonic()
    if first is None and any(p.poll() is not None for p in running):
      first = now
    if now - began > 200 or (first and now - first > 2 * TIMEOUT):
      break
    time.sleep(0.05)
  return time.monotonic() - (first or began)


def results(path, i):
  path = pathlib.Path(f'{path}.{i}')
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """The folder of a run by one process of eight devices."""
  workdir = tmp_path_factory.mktemp('one')
  loop.train_and_evaluate(tiny.options(**STEPS), workdir)
  return workdir


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Two processes of four devices, which make several runs in one life."""
  folder = tmp_path_factory.mktemp('two')
  jobs = [
    {'workdir': 'run', 'overrides': ACROSS, 'befalls': [1, 'SIGTERM', 4]},
    {'workdir': 'run', 'overrides': ACROSS, 'befalls': [1, 'SIGKILL', 10]},
  ]
  for job in jobs:
    job['order'] = 'interleaved'
  return folder, *start(folder, 2, jobs)


def saved(workdir, step):
  """A checkpoint as a single process reads it."""
  run = setup.set_up(tiny.options(**STEPS), workdir, resume=True)
  with run.checkpoints as checkpoints:
    return checkpoints.restore(run.programs.abstract_state, step=step).state


def assert_close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def losses(workdir):
  rows = metrics.read_metrics(workdir / metrics.FILE_NAME)
  return [row['train/total_loss'] for row in rows if 'train/total_loss' in row]


def test_two_processes_train_as_one(one, two):
  folder, ends, _ = two
  options = tiny.options(**STEPS)
  batches = data.batch_dataset(
    data.load(options.data).splits['train'],
    batch_size=options.batch_size,
    seed=options.seed,
  )
  for end in ends:
    (result,) = end.results
    # Each process has one device of every pair along `tensor`, so that both
    # need all rows.
    assert result['rows'] == list(range(16))
    stream = [process.digest(batches[i]) for i in range(result['step'])]
    assert result['batches'] == stream
  assert_close(saved(folder / 'run', 1), saved(one, 1))
  np.testing.assert_allclose(losses(folder / 'run')[:3], losses(one), rtol=1e-4)


def test_a_signal_or_death_of_one_ends_both_and_is_named(two):
  folder, ends, seconds = two
  (step,) = {end.results[0]['step'] for end in ends}
  assert 4 <= step < 8
  words = f'stopped by a signal at step {step}; saved, will go on here'
  assert words in ends[0].output
  assert f'going on from the checkpoint of step {step}' in ends[0].output
  # The second life ends by a death.
  assert [end.status for end in ends] == [1, -9]
  assert 'process 0 of 2 ends: process 1 died; it had got' in ends[0].errors
  assert seconds < TIMEOUT
  # Process 0 alone speaks and writes rows, to a file for each life.
  assert 'loss' in ends[0].output and 'loss' not in ends[1].output
  assert 8 <= len(losses(folder / 'run')) <= 10
  assert len(list((folder / 'run' / 'tensorboard').iterdir())) == 2


def test_one_goes_on_from_a_checkpoint_of_two_as_two_did(two, tmp_path, capsys):
  source_run, workdir = two[0] / 'run', tmp_path / 'run'
  shutil.copytree(source_run, workdir)
  for path in (workdir / 'checkpoints').iterdir():
    if path.name not in ('1', '2'):
      shutil.rmtree(path)
  loop.train_and_evaluate(tiny.options(**STEPS), workdir, resume=True)
  assert 'going on from the checkpoint of step 2' in capsys.readouterr().out
  assert_close(saved(workdir, 3), saved(source_run, 3))


def test_a_run_that_goes_on_obeys_sigterm_and_names_who_is_stuck(tmp_path):
  short = tiny.options(**{**SMALL, 'total_steps': 3})
  loop.train_and_evaluate(short, tmp_path / 'run')
  job = {'workdir': 'run', 'overrides': SMALL}
  jobs = [
    {**job, 'befalls': [1, 'SIGTERM', 0]},  # before any step of these processes
    {**job, 'befalls': [1, 'stuck', 12]},
  ]
  # The timeout exceeds the time for compiling the step on a busy machine.
  timeouts = {'stall_timeout_seconds': 25}
  ends, _ = start(tmp_path, 2, jobs, timeouts=timeouts)
  stopped = {end.results[0]['step'] for end in ends}
  assert len(stopped) == 1 and 4 <= min(stopped) < 9, stopped
  message = 'process 1 got only to the data of step 12'
  other = ends[0]
  assert other.status == 1 and message in other.errors
  assert len(other.errors.splitlines()) < 20


def test_sigterm_to_one_stops_an_evaluation_of_all(tmp_path):
  job = {
    'workdir': 'run',
    'overrides': {**SMALL, 'total_steps': 4},
    'evals': None,
  }
  befallen = {**job, 'befalls': [1, 'SIGTERM_evaluating', 3]}
  ends, _ = start(tmp_path, 2, [befallen, job])
  assert [end.status for end in ends] == [0, 0], ends[0].errors[-2000:]
  for end in ends:
    assert [result['step'] for result in end.results] == [3, 4]
  rows = metrics.read_metrics(tmp_path / 'run' / metrics.FILE_NAME)
  name = 'eval/train_capacity/loss'
  assert [row['step'] for row in rows if name in row] == [3, 4]


@pytest.mark.parametrize(
  ('number', 'event', 'words'),
  [
    (0, 'SIGSTOP', 'process 0 does not answer'),
    (1, 'full_disk', 'process 1 failed: CheckpointError: checkpoint'),
    # JAX's coordinator ends with process 0, and its message may arrive first.
    (0, 'SIGKILL', 'process 0 died|coordination'),
  ],
)
def test_what_befalls_one_ends_the_other(tmp_path, number, event, words):
  job = {'workdir': 'run', 'overrides': SMALL, 'befalls': [number, event, 3]}
  frozen = 0 if event == 'SIGSTOP' else None
  timeouts = {'stall_timeout_seconds': 0}
  ends, seconds = start(tmp_path, 2, [job], frozen=frozen, timeouts=timeouts)
  other = ends[1 - number]
  assert other.status != 0 and re.search(words, other.errors)
  if event == 'SIGKILL':
    assert seconds < TIMEOUT
  else:
    assert len(other.errors.splitlines()) < 20


def test_processes_that_differ_are_named(tmp_path):
  job = {'workdir': 'run', 'overrides': SMALL, 'seeds': [0, 3]}
  ends, _ = start(tmp_path, 2, [job])
  assert [end.status for end in ends] == [1, 1]
  for end in ends:
    assert 'the config of process 1 is not that of process 0' in end.errors


def test_hooks_and_evaluations_of_two_processes(tmp_path):
  """The main program's hooks and evaluations wait for no other process."""
  job = {
    'workdir': 'run',
    'order': 'interleaved',
    'overrides': {
      **STEPS,
      'total_steps': 2,
      'sample': {'num_tokens': 2},
      'data': {'task': {'kind': 'prefix_lm'}},
      'mesh': {'data': 4, 'expert': 2},
      'trace': {'every_steps': 1},
    },
    'hooks': True,
    'evals': {'generate': {'num_examples': 8, 'num_tokens': 2}},
  }
  ends, _ = start(tmp_path, 2, [job])
  assert [end.status for end in ends] == [0, 0], ends[0].errors[-2000:]
  assert not (tmp_path / 'run' / 'processes').exists()
  # Rows of a process need not be neighbours.
  assert ends[1].results[0]['rows'] == [2, 3, 6, 7, 10, 11, 14, 15]
  names = {path.name for path in (tmp_path / 'run').iterdir()}
  assert names >= {'index.html', 'generate_examples.txt', 'sample.txt'}
  rows = metrics.read_metrics(tmp_path / 'run' / metrics.FILE_NAME)
  keys = {key for row in rows for key in row}
  assert {'eval/generate/chrf', 'eval/train_capacity/loss'} <= keys
  # One process wrote the rows of both.
  folder = tmp_path / 'run' / 'trace'
  trace = traces.read(folder)
  assert trace.steps_of('train') == (0, 1)
  run = setup.set_up(tiny.options(**job['overrides']), tmp_path / 'one')
  for record, batch in zip(trace.records(), run.batches(0)):
    np.testing.assert_array_equal(record.tokens, batch['tokens'])
    chosen = record.layers[0].expert[..., 0] >= 0
    np.testing.assert_array_equal(chosen, record.documents > 0)
