"""The script that kills sees what kills lose, double or leave half."""

import random
import sys

import pytest

from experiments import kills
from experiments.launching.processes import Processes, start
from experiments.soaking.soak_disturbances import FATAL
from experiments.soaking.soak_evidence import Tally
from moe_jax.errors import InputError
from tests import programs

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
