"""A command that was killed leaves no half run, and is simply started again."""

import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax.compression import __main__ as command
from moe_jax.compression import whole_run
from tests.compression.test_extract import languages_of
from tests.generation import folders

# Kills the process once the checkpoint of the new run is written, before the
# run is whole.
KILLED = """
import os, signal, sys
from moe_jax.compression import __main__ as command
from moe_jax.runs import workdir
workdir.claim = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
command.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_at_its_end_it_is_started_again(tmp_path):
  folders.write(tmp_path / 'run', **languages_of(('copy', 'reverse')))
  argv = ['extract', '--task=copy', f'--run={tmp_path / "run"}']
  killed, whole = tmp_path / 'killed', tmp_path / 'whole'
  child = subprocess.run(
    [sys.executable, '-c', KILLED, *argv, f'--output={killed}'], check=False
  )
  assert child.returncode == -signal.SIGKILL
  unfinished = '.killed.unfinished-*'
  assert [*tmp_path.glob(f'{unfinished}/killed/checkpoints/0')]
  with pytest.raises(ValueError, match='holds no'):
    whole_run.read(killed)
  for folder in (killed, whole):
    command.main([*argv, f'--output={folder}'])
  assert not [*tmp_path.glob(unfinished)]
  restarted, unbroken = whole_run.read(killed), whole_run.read(whole)
  assert restarted.options.model == unbroken.options.model
  jax.tree.map(
    np.testing.assert_array_equal, restarted.variables, unbroken.variables
  )
