"""Checkpoints survive processes killed at any moment, and a full disk."""

import os
import pathlib
import resource
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.runs.checkpointer import Checkpointer, CheckpointError
from moe_jax.runs.retention import CheckpointOptions
from tests import programs

SIZE = 2_000_000  # 8 MB take long enough to write that a kill can hit it


def make_state(step: int) -> dict:
  """A state of random bits, which cannot be compressed."""
  rng = np.random.default_rng(step)
  return {
    'step': jnp.int32(step),
    'w': jnp.asarray(rng.random(SIZE, 'float32')),
  }


def restore_and_check(checkpointer: Checkpointer) -> int:
  """Restores a checkpoint, compares every bit of it, and returns its step."""
  target = {
    'step': jax.ShapeDtypeStruct((), jnp.int32),
    'w': jax.ShapeDtypeStruct((SIZE,), jnp.float32),
  }
  restored = checkpointer.restore(target)
  expected = make_state(restored.step)
  for name, array in expected.items():
    np.testing.assert_array_equal(restored.state[name], array)
  return restored.step


def child_saves_until_killed(directory: str) -> None:
  with Checkpointer(
    directory, CheckpointOptions(keep_newest=2)
  ) as checkpointer:
    step = restore_and_check(checkpointer)
    print(step, flush=True)
    while True:
      step += 1
      checkpointer.save(step, make_state(step))


def limit_file_size(size: int) -> None:
  """Makes writes beyond `size` bytes fail from here on, as on a full disk."""
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def child_fills_the_disk(directory: str) -> None:
  with Checkpointer(directory) as checkpointer:
    checkpointer.save(1, make_state(1))
    checkpointer.wait()
    limit_file_size(4_000_000)
    checkpointer.save(2, make_state(2))
    try:
      checkpointer.wait()
    except CheckpointError as error:
      print(error)
    remains = pathlib.Path(directory).glob('2*/**/*')
    print(sum(path.stat().st_size for path in remains) < 1_000_000)
    checkpointer.save(3, make_state(3))
    try:
      checkpointer.save(4, make_state(4))
    except CheckpointError as error:
      print(str(error).split(' not saved')[0])
    limit_file_size(resource.RLIM_INFINITY)
    print(restore_and_check(checkpointer))
    checkpointer.save(5, make_state(5))


def child_tries_again_and_again(directory: str) -> None:
  """Fails at every stage of a save, mostly while other threads still write."""
  state = {f'w{i}': make_state(i)['w'][:200_000] for i in range(10)}
  causes = []
  with Checkpointer(directory) as checkpointer:
    for size in [100, 300, 30_000, 400_000, 1_000_000] * 6:
      limit_file_size(size)
      try:
        checkpointer.save(2, state)
        checkpointer.wait()
      except CheckpointError as error:
        causes.append(str(error).splitlines()[0])
    limit_file_size(resource.RLIM_INFINITY)
    checkpointer.save(2, state)
    checkpointer.save(3, state)  # after this save no thread writes any more
  print(len(causes), [text for text in causes if 'too large' not in text])


def start(function, directory) -> subprocess.Popen:
  module = 'tests.runs.test_checkpoint_faults'
  code = f'import {module} as m; m.{function.__name__}({str(directory)!r})'
  return programs.started('-c', code, env={'JAX_PLATFORMS': 'cpu'})


def kill(child: subprocess.Popen, directory, moment: str | float) -> None:
  """Kills `child` once it saves, when a path matches or after some seconds."""
  assert child.stdout.readline().strip().isdigit(), child.communicate()[1]
  if isinstance(moment, float):
    time.sleep(moment)
  else:
    deadline = time.monotonic() + 20
    while not any(directory.glob(moment)):
      assert time.monotonic() < deadline, f'{moment} was never there'
  child.kill()
  assert child.wait() == -signal.SIGKILL
  child.stdout.close()
  child.stderr.close()


def kill_and_check(directory, moments) -> None:
  with Checkpointer(directory) as checkpointer:
    checkpointer.save(1, make_state(1))
  last = 1
  for moment in moments:
    # Each child starts from the files that the one before left.
    child = start(child_saves_until_killed, directory)
    kill(child, directory, moment)
    with Checkpointer(directory) as checkpointer:
      step = restore_and_check(checkpointer)
    assert step >= last
    last = step
  with Checkpointer(directory) as checkpointer:
    restore_and_check(checkpointer)
    checkpointer.save(last + 1, make_state(last + 1))
  names = {path.name for path in directory.iterdir()}
  assert str(last + 1) in names and all(name.isdigit() for name in names)


def test_a_bare_number_has_its_manifest_at_every_moment(tmp_path):
  with Checkpointer(tmp_path, CheckpointOptions(keep_newest=1)) as checkpointer:
    for step in range(4):
      checkpointer.save(step, make_state(step))
      deadline = time.monotonic() + 20
      # The loop ends once this one is saved and the one before is deleted.
      while checkpointer.steps() != [step]:
        assert time.monotonic() < deadline
        for folder in tmp_path.iterdir():
          if folder.name.isdigit() and not (folder / 'manifest.json').exists():
            assert not folder.exists()  # renamed since it was listed


@pytest.mark.slow
def test_killed_at_one_moment_after_another(tmp_path):
  arrays = '*.orbax-checkpoint-tmp/ocdbt.process_0/d/*'
  kill_and_check(tmp_path, [arrays, '*/manifest.json.tmp', '*.deleting', 0.2])


def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path):
  child = start(child_fills_the_disk, tmp_path)
  out, err = child.communicate(timeout=60)
  lines = out.splitlines()
  assert child.returncode == 0, err
  assert lines[0].startswith(f'checkpoint 2 not saved to {tmp_path}: ')
  assert 'File too large' in lines[0] and len(lines[0]) < 300
  assert lines[1:] == [
    'last good step: 1',
    'True',  # the unfinished files are deleted: their space is needed
    'checkpoint 3',
    '1',
  ]
  assert 'orbax' not in err  # its 200 lines of messages are silenced
  with Checkpointer(tmp_path) as checkpointer:
    assert restore_and_check(checkpointer) == 5


@pytest.mark.slow
def test_each_failed_save_tells_its_own_cause_and_hinders_none(tmp_path):
  child = start(child_tries_again_and_again, tmp_path)
  out, err = child.communicate(timeout=120)
  assert out == '30 []\n', err
  # The long messages of Orbax and asyncio are silenced.
  assert 'OCDBT' not in err
  assert sorted(os.listdir(tmp_path)) == ['2', '3']
