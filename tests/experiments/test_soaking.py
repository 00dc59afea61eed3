"""The checks of the soak and of kills detect what they must."""

import json
import random
import signal
import sys

import numpy as np
import pytest

from experiments import kills
from experiments.launching.processes import Processes, start
from experiments.soaking import soak_disturbances, soak_evidence
from experiments.soaking.soak_disturbances import FATAL
from experiments.soaking.soak_evidence import Tally
from moe_jax.errors import InputError
from tests import programs

REFERENCE = {s: {'0': f'a{s}', '1': f'b{s}'} for s in range(1, 7)}


def witness(folder, attempt, begin, steps, process=0, rows=None):
  """Writes the lines of a process that begins at a step and takes others."""
  folder.mkdir(exist_ok=True)
  lines = [{'begin': begin}]
  for step in steps:
    step_rows = REFERENCE.get(rows or step, {})
    process_rows = {str(process): step_rows[str(process)]}
    lines.append({'step': step, 'rows': process_rows})
  with (folder / f'witness_{process}.jsonl').open('a') as file:
    for line in lines:
      file.write(json.dumps({**line, 'attempt': attempt}) + '\n')


def tally_of(folder):
  tally = soak_evidence.Tally()
  soak_evidence.count_batches(folder, REFERENCE, tally)
  return tally


def test_steps_after_a_checkpoint_are_repeated_and_no_batch_is_lost(tmp_path):
  # Processes were killed in step 5, which one of them did not see, and
  # restarted at step 3.
  witness(tmp_path, 1, 1, [1, 2, 3, 4, 5])
  witness(tmp_path, 1, 1, [1, 2, 3, 4], process=1)
  (tmp_path / 'witness_1.jsonl').open('a').write('{"step": 5, "ro')
  for process in range(2):
    witness(tmp_path, 2, 3, [3, 4, 5, 6], process=process)
  tally = tally_of(tmp_path)
  assert not tally.faults
  assert tally.counts['steps repeated'] == 3


@pytest.mark.parametrize(
  ('begin', 'steps', 'rows', 'fault'),
  [
    (5, [5, 6], None, 'step 4 is nowhere'),
    (4, [5, 6], None, '1 batches lost'),
    (4, [3, 4, 5, 6], None, '1 batches doubled'),
    (4, [4, 5, 6], 2, '3 batches of another step'),
  ],
)
def test_what_is_lost_doubled_or_another_is_seen(
  tmp_path, begin, steps, rows, fault
):
  for process in range(2):
    witness(tmp_path, 1, 1, [1, 2, 3], process=process)
    witness(tmp_path, 2, begin, steps, process=process, rows=rows)
  assert any(fault in text for text in tally_of(tmp_path).faults)


@pytest.mark.parametrize(
  ('begin', 'array', 'gradient', 'is_seen'),
  [
    (4, 'aa', [1, 1, 1 + 1e-6], False),
    (5, 'aa', [1, 1, 1], True),
    (4, 'xx', [1, 1, 1], True),
    (4, 'aa', [1, 1, 1.01], True),
    (4, 'aa', [1, np.nan, 1], True),
  ],
)
def test_an_array_or_a_gradient_that_differs_is_seen(
  tmp_path, begin, array, gradient, is_seen
):
  first = {'loss': np.float32(2.5), 'w': np.ones(3)}
  expected = {'begin': 4, 'arrays': {'w': 'aa'}, 'first': first}
  for step in (4, 5):
    path = tmp_path / f'gradient_{step}.npz'
    np.savez(path, loss=np.float32(2.5), w=np.array(gradient))
  tally = soak_evidence.Tally()
  line = {'begin': begin, 'arrays': {'w': array}}
  soak_evidence.check(tmp_path, expected, [line], tally)
  assert bool(tally.faults) == is_seen


def test_processes_that_hang_are_a_fault(tmp_path, monkeypatch):
  monkeypatch.setattr(soak_disturbances, 'HANG_SECONDS', 0.3)
  code = 'import signal, time; signal.signal(15, lambda *a: 0); time.sleep(60)'
  processes = processes_of(tmp_path, code, code)
  draw = random.Random(0)
  monkeypatch.setattr(draw, 'uniform', lambda a, b: 0.5)
  monkeypatch.setattr(soak_disturbances, 'MOMENTS', ('start',))
  monkeypatch.setattr(soak_disturbances, 'DISTURBANCES', ('stop one',))
  tally = soak_evidence.Tally()
  soak_disturbances.disturb(processes, tmp_path, 1, tally, draw)
  assert len(tally.faults) == 1 and 'had not ended' in tally.faults[0]
  assert all(p.returncode == -signal.SIGKILL for p in processes.all)


def processes_of(folder, *codes):
  log = folder / 'log.txt'
  return Processes(
    [start([sys.executable, '-c', code], log, {}) for code in codes]
  )


@pytest.mark.parametrize(
  ('first', 'second', 'refused', 'faults'),
  [('', 'exit(1)', 1, 0), ('', '', 0, 0), ('exit(1)', 'exit(1)', 2, 1)],
)
def test_of_two_who_start_at_once_one_must_go_on(
  tmp_path, first, second, refused, faults
):
  tally = soak_evidence.Tally()
  pair = [processes_of(tmp_path, code) for code in (first, second)]
  for starter in pair:
    starter.wait(30)
  winner = soak_disturbances.contest(*pair, tally)
  assert tally.counts['starters refused'] == refused
  assert len(tally.faults) == faults
  assert winner is pair[0] or not refused or faults
  script = 'import time; time.sleep(60)'
  pair = [processes_of(tmp_path, code) for code in (script, 'exit(1)')]
  assert soak_disturbances.contest(*pair, tally) is pair[0]
  pair[0].wait(0)


def test_the_only_checkpoint_is_left_alone_and_the_newest_is_damaged(tmp_path):
  for step in (25, 50):
    (tmp_path / str(step)).mkdir()
    (tmp_path / str(step) / 'manifest.json').write_text('{}')
    (tmp_path / str(step) / 'array').write_bytes(bytes(range(64)))
    before = files(tmp_path)
    tally = soak_evidence.Tally()
    soak_disturbances.corrupt(tmp_path, tally, random.Random(1))
    changed = {k for k in before if files(tmp_path).get(k) != before[k]}
    assert sum(tally.counts.values()) == len(changed) == (step == 50)
    assert all(name.startswith('50/') for name in changed)


def files(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in folder.rglob('*')
    if p.is_file()
  }


SLOWLY = """
import pathlib, sys, time
part, whole = (pathlib.Path(sys.argv[1]) / name for name in ('part', 'whole'))
"""
PROGRAMS = {
  'whole': "part.write_text('12'); time.sleep(1); part.rename(whole)",
  'half': "whole.write_text('1'); time.sleep(1); whole.write_text('12')",
  'doubled': "whole.open('a').write('12'); time.sleep(1)",
}


def result(folder):
  if not (folder / 'whole').exists():
    raise InputError('nothing is there yet')
  return (folder / 'whole').read_text()


@pytest.mark.parametrize(
  ('program', 'fault'),
  [
    ('whole', ''),
    ('half', 'a half run is read'),
    ('doubled', 'another result'),
  ],
)
def test_what_a_kill_leaves_half_or_doubles_is_a_fault(
  tmp_path, program, fault
):
  def begin(folder, attempt, fatal):
    arguments = [sys.executable, '-c', SLOWLY + PROGRAMS[program], str(folder)]
    return Processes([start(arguments, folder / 'log_0.txt', {})])

  # No kill comes by a rename, as these programs do not count theirs.
  class Times(random.Random):
    def random(self):
      return 0.9

  work = kills.Work(
    'a', tmp_path, begin, result, True, seconds=1, renames=1, expected='12'
  )
  tally = Tally()
  killed = work.disturb(tmp_path / 'run', Times(1), tally)
  assert tally.counts['a'] == len(killed) > 0
  assert fault in ' '.join(tally.faults)
  assert bool(tally.faults) == bool(fault)


def test_a_program_dies_before_the_rename_that_is_drawn(tmp_path):
  module = tmp_path / 'renames.py'
  module.write_text(
    'import pathlib\n'
    'for name in "abc":\n'
    '  pathlib.Path(name + ".tmp").write_text(name)\n'
    '  pathlib.Path(name + ".tmp").replace(name)\n'
  )
  outputs = []
  for fatal in ('2', '0'):
    child = programs.run('-c', FATAL, fatal, 'renames', cwd=tmp_path)
    outputs.append(child.stdout.splitlines()[-1])
    names = sorted(path.name for path in tmp_path.glob('[abc]*'))
    assert names == (['a', 'b.tmp'] if fatal == '2' else ['a', 'b', 'c'])
  assert outputs == ['killed before the name b', 'renamed 3']
