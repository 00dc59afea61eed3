"""Many runs on one machine are skipped, continued, stopped and reported."""

import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from experiments import launch
from experiments.launching import processes
from experiments.launching.processes import (
  DONE,
  FAILED,
  STOPPED,
  WAITING,
  Command,
)
from moe_jax import items
from moe_jax.items import Item

ROOT = pathlib.Path(__file__).parents[1]
SHRUNK = 'configs/tiny_switch.py:runlocal'


def command(folder, name, *scripts, env=None):
  """Processes that run Python scripts, which need no jax."""
  return Command(
    name=name,
    commands=lambda: [[sys.executable, '-c', script] for script in scripts],
    logs=[folder / f'{name}.{i}.log' for i in range(len(scripts))],
    done=(folder / f'{name}.done').touch,
    env=env or {},
  )


def run_all(commands, places, **options):
  return processes.run_all(
    commands, places, message=lambda text: None, **options
  )


SLOWER = 'import time; time.sleep(1); print("saved"); raise SystemExit(75)'


def test_a_failure_stops_no_other(tmp_path):
  commands = [
    command(tmp_path, 'bad', 'print("moe_jax: no"); raise SystemExit(3)'),
    command(tmp_path, 'good', 'print("fine")'),
    # The second process stops by itself, without a signal.
    command(tmp_path, 'preempted', 'raise SystemExit(75)', SLOWER),
  ]
  outcomes = run_all(commands, [{}])
  assert outcomes == {'bad': FAILED, 'good': DONE, 'preempted': STOPPED}
  assert [path.name for path in tmp_path.glob('*.done')] == ['good.done']
  assert commands[-1].logs[1].read_text() == 'saved\n'
  assert (tmp_path / 'good.0.log').read_text() == 'fine\n'
  lines = launch.summary(commands, outcomes).splitlines()
  assert lines[0].split() == ['failed', 'bad']
  assert lines[1].strip() == f'{tmp_path}/bad.0.log: moe_jax: no'


def test_each_place_has_one_item_at_a_time(tmp_path, monkeypatch):
  # Places are among the devices that the caller has.
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-ab,7')
  with pytest.raises(ValueError, match=r'4,GPU-ab,7 has 3 .*--devices=4'):
    processes.places(1, 'gpu', 4)
  # Every item records its place and times; the times of a place must not
  # overlap.
  script = (
    'import os, time; t = time.time(); time.sleep(0.3);'
    'print(os.environ["CUDA_VISIBLE_DEVICES"], t, time.time())'
  )
  commands = [command(tmp_path, f'item{i}', script) for i in range(5)]
  run_all(commands, processes.places(1, 'gpu', 2))
  spans = {'4': [], 'GPU-ab': []}
  for item in commands:
    device, begin, end = item.logs[0].read_text().split()
    spans[device].append((float(begin), float(end)))
  for times in spans.values():
    assert len(times) >= 2
    times.sort()
    for (_, end), (begin, _) in itertools.pairwise(times):
      assert end <= begin


def test_where_one_process_fails_the_others_of_the_run_are_ended(tmp_path):
  sleeper = 'import time; time.sleep(60)'
  pair = command(tmp_path, 'pair', 'raise SystemExit("moe_jax: lost")', sleeper)
  began = time.monotonic()
  assert run_all([pair], [{}]) == {'pair': FAILED}
  assert time.monotonic() - began < 30
  summary = launch.summary([pair], {'pair': FAILED}).splitlines()
  # The process that was stopped only because the other failed is not reported.
  assert len(summary) == 2
  assert summary[1].endswith('pair.0.log: moe_jax: lost')


SAVES = (
  'import signal, sys, time;'
  'signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(75)));'
  'print("ready", flush=True); time.sleep(60)'
)
STUCK = (
  'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);'
  'print("ready", flush=True); time.sleep(60)'
)


def send(commands, *numbers):
  """Sends signals to this process once the commands are ready."""

  def send_when_ready():
    logs = [command.logs[0] for command in commands]
    while not all(log.exists() and 'ready' in log.read_text() for log in logs):
      time.sleep(0.05)
    for number in numbers:
      os.kill(os.getpid(), number)
      time.sleep(0.5)

  thread = threading.Thread(target=send_when_ready)
  thread.start()
  return thread


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_has_runs_save_and_starts_no_more(tmp_path, number):
  commands = [
    command(tmp_path, 'saves', SAVES),
    command(tmp_path, 'stuck', STUCK),
    command(tmp_path, 'later', 'print("never")'),
  ]
  before = signal.getsignal(number)
  # A second signal kills what the first asked to stop.
  twice = number == signal.SIGINT
  thread = send(commands[:2], *[number] * (1 + twice))
  began = time.monotonic()
  outcomes = run_all(commands, [{}, {}], grace_seconds=60.0 if twice else 0.5)
  thread.join()
  assert time.monotonic() - began < 50
  assert signal.getsignal(number) is before
  assert outcomes == {'saves': STOPPED, 'stuck': STOPPED, 'later': WAITING}
  assert commands[0].logs[0].read_text() == 'ready\nsaved\n'
  assert not commands[2].logs[0].exists()


def test_sweeps_multiply():
  command = [
    *(f'--config={SHRUNK}', '--output=out', '--config.batch_size=4'),
    *('--config.mesh.all', '--sweep', 'seed=0,1'),
    *('--sweep', 'model.width=8,16', '--config.model.moe.num_experts', '2'),
  ]
  made = launch.items_of(*launch.parse(command))
  assert [item.workdir for item in made] == [
    f'out/seed={seed},width={width}' for seed in '01' for width in (8, 16)
  ]
  assert sorted(made[2].flags()) == sorted(
    [
      *('--config.batch_size=4', '--config.mesh.all=true'),
      *('--config.model.moe.num_experts=2', '--config.seed=1'),
      '--config.model.width=8',
    ]
  )
  twins = [('data.seq_len', '8'), ('other.seq_len', '9')]
  (twin,) = items.swept('configs/x.py', [], twins, 'out')
  assert twin.workdir == 'out/data.seq_len=8,other.seq_len=9'
  with pytest.raises(ValueError, match='seed is given twice'):
    items.swept('configs/x.py', ['--config.seed=1'], [('seed', '0,1')], 'out')


@pytest.mark.parametrize(
  ('overrides', 'folders', 'message'),
  [
    ({'model.widht': 4}, ('a',), "'model.widht'; did you mean 'model.width'"),
    ({}, ('a', 'a'), 'two items have the workdir'),
    (
      {'checkpoint.directory': 'gs://b/run'},
      ('a', 'b'),
      'two items have the checkpoint.directory gs://b/run',
    ),
  ],
)
def test_bad_items_fail_before_any_starts(overrides, folders, message):
  bad = [Item(SHRUNK, overrides, folder) for folder in folders]
  with pytest.raises(ValueError, match=message):
    items.check(bad)


def test_items_come_from_a_python_file(tmp_path):
  path = tmp_path / 'study.py'
  path.write_text(
    'def get_items():\n'
    f"  return [({SHRUNK!r}, {{'seed': s}}, f'out/{{s}}') for s in (3, 5)]\n"
  )
  read = launch.read_items(str(path))
  assert read[1] == Item(SHRUNK, {'seed': 5}, 'out/5')
  path.write_text("def get_items():\n  return [('x.py', 'out', {})]\n")
  with pytest.raises(ValueError, match=r"'x\.py', 'out', {}"):
    launch.read_items(str(path))


def test_processes_of_one_run_know_each_other(tmp_path):
  item = Item(SHRUNK, {}, str(tmp_path))
  pair = launch.make_command(item, processes=2, devices_per_process=3)
  first, second = pair.commands()
  assert first[:-1] == second[:-1] and '--num_processes=2' in first
  assert (first[-1], second[-1]) == ('--process_id=0', '--process_id=1')
  assert pair.env['JAX_NUM_CPU_DEVICES'] == '3'
  # A port that was free when the launcher started can be in use later.
  assert pair.commands()[0] != first


# Settings that are 0, so that nothing but training steps is run.
NOT_RUN = (
  *('sample.num_tokens', 'model.moe.num_experts'),
  *(f'evals.{name}.every_steps' for name in ('train_capacity', 'all_tokens')),
)


@pytest.mark.slow
def test_a_run_trains_once(tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(ROOT)
  command = [
    *(f'--config={SHRUNK}', f'--output={tmp_path}', '--sweep', 'seed=1'),
    *(f'--config.{key}=0' for key in NOT_RUN),
  ]
  status, output = launch.main(command), capfd.readouterr()
  assert status == 0, output
  entry = json.loads((tmp_path / 'seed=1' / items.FINISHED).read_text())
  assert entry['overrides'] == {**dict.fromkeys(NOT_RUN, '0'), 'seed': '1'}
  assert launch.main(command) == 0
  assert capfd.readouterr().out.count('finished before') == 1
