"""Checkpoints survive kills, a full disk and storage errors that pass."""

import builtins
import errno
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.runs import storage_errors
from moe_jax.runs.checkpointer import Checkpointer, CheckpointError
from moe_jax.runs.retention import CheckpointOptions
from moe_jax.runs.storage_errors import Retry, is_transient
from tests import programs

SIZE = 2_000_000  # 8 MB take long enough to write that a kill can hit it
FEW = 3000


def make_state(step: int, size: int = SIZE) -> dict:
  """A state of random bits, which cannot be compressed."""
  w = np.random.default_rng(step).random(size, 'float32')
  return {'step': jnp.int32(step), 'w': jnp.asarray(w)}


def restored(checkpointer: Checkpointer, size: int = SIZE):
  """A checkpoint that is restored, of which every bit is compared."""
  target = jax.eval_shape(lambda: make_state(0, size))
  checkpoint = checkpointer.restore(target)
  expected = make_state(checkpoint.step, size)
  jax.tree.map(np.testing.assert_array_equal, checkpoint.state, expected)
  return checkpoint


def child_saves_until_killed(directory: str) -> None:
  with Checkpointer(
    directory, CheckpointOptions(keep_newest=2)
  ) as checkpointer:
    step = restored(checkpointer).step
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
    print(restored(checkpointer).step)
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


def start(function, directory, **env) -> subprocess.Popen:
  code = f'import {__name__} as m; m.{function.__name__}({str(directory)!r})'
  return programs.started('-c', code, env={'JAX_PLATFORMS': 'cpu', **env})


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
      step = restored(checkpointer).step
    assert step >= last
    last = step
  with Checkpointer(directory) as checkpointer:
    restored(checkpointer)
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
    assert restored(checkpointer).step == 5


@pytest.mark.slow
def test_each_failed_save_tells_its_own_cause_and_hinders_none(tmp_path):
  child = start(child_tries_again_and_again, tmp_path)
  out, err = child.communicate(timeout=120)
  assert out == '30 []\n', err
  # The long messages of Orbax and asyncio are silenced.
  assert 'OCDBT' not in err
  assert sorted(os.listdir(tmp_path)) == ['2', '3']


SOURCE = programs.ROOT / 'experiments' / 'soaking' / 'failing_storage.c'


def retrying(tries, seconds=0.01):
  return CheckpointOptions(tries=tries, retry_seconds=seconds)


def oserror(name):
  number = getattr(errno, name)
  return OSError(number, os.strerror(number))


class ConnectionError_(OSError):
  """An error as that of requests: no subclass of Python's, without errno."""


ConnectionError_.__name__ = 'ConnectionError'


class HttpError(Exception):
  """An error as that of gcsfs (`code`) and of aiohttp (`status`)."""

  def __init__(self, **fields):
    super().__init__('from the server')
    vars(self).update(fields)


def caused(cause):
  error = RuntimeError('could not be saved')
  error.__cause__ = cause
  return error


@pytest.mark.parametrize(
  ('error', 'transient'),
  [
    *((oserror(n), True) for n in ('EIO', 'ESTALE', 'EBUSY', 'ETIMEDOUT')),
    *((oserror(n), False) for n in ('ENOSPC', 'EDQUOT', 'EACCES', 'ENOENT')),
    (TimeoutError('no answer'), True),
    (ValueError('UNAVAILABLE: connection reset'), True),
    (ValueError('not UNAVAILABLE'), False),
    # tensorstore's error number takes precedence over its status.
    (ValueError("UNKNOWN: fsync [os_error_code='5'] [x='y']"), True),
    (ValueError("UNAVAILABLE: fsync [os_error_code='28']"), False),
    (ConnectionError('closed'), True),
    (ConnectionError_('no route'), True),
    *((HttpError(code=code), True) for code in (408, 429, '503')),
    (HttpError(status=500), True),
    *((HttpError(code=code), False) for code in (None, 401, 404, 5000)),
    (HttpError(status='failed'), False),
    (caused(oserror('EIO')), True),
  ],
)
def test_what_may_pass_by_itself(error, transient):
  assert is_transient(error) == transient


def test_waits_grow_and_tries_end(monkeypatch):
  waits, calls = [], []
  monkeypatch.setattr(storage_errors.time, 'sleep', waits.append)

  def fail(name):
    calls.append(name)
    raise oserror(name)

  with pytest.raises(OSError, match='Input/output'):
    Retry(4, 0.5)(fail, 'EIO')
  assert (calls, waits) == (['EIO'] * 4, [0.5, 1.0, 2.0])
  with pytest.raises(OSError, match='No space'):
    Retry(4, 0.5)(fail, 'ENOSPC')
  assert len(calls) == 5 and len(waits) == 3


class Failing:
  """A file system function that fails for paths containing a word."""

  def __init__(self, function, word, name, failures):
    self.function, self.word, self.error = function, word, oserror(name)
    self.left, self.calls = failures, 0

  def __call__(self, path, *args, **kwargs):
    if re.search(self.word, str(path)):
      self.calls += 1
      if self.left > 0:
        self.left -= 1
        raise self.error
    return self.function(path, *args, **kwargs)


def next_state(arrays):
  return jax.tree.map(lambda x: x * 3 + 1, arrays)


def save(folder, step, options=CheckpointOptions()):
  with Checkpointer(folder, options) as checkpoints:
    checkpoints.save(step, make_state(step, FEW))


@pytest.mark.parametrize('function', ['mkdir', 'rename'])
def test_a_save_is_tried_again(tmp_path, monkeypatch, caplog, function):
  # Folders are made before arrays are written, and renamed afterwards.
  failing = Failing(getattr(os, function), '2.saving', 'ESTALE', failures=2)
  monkeypatch.setattr(os, function, failing)
  save(tmp_path, 2, retrying(3))
  assert failing.left == 0
  monkeypatch.undo()
  with Checkpointer(tmp_path) as checkpoints:
    assert restored(checkpoints, FEW)[2:] == (2, [])
  assert [path.name for path in tmp_path.iterdir()] == ['2']
  logs = [r.getMessage() for r in caplog.records if 'again' in r.getMessage()]
  assert 'Stale file handle; trying again in 0.01 s (try 2 of 3)' in logs[0]
  assert 'in 0.02 s (try 3 of 3)' in logs[1]


class OneOfSeveral(Checkpointer):
  """A process of several, which keeps no copy for writing arrays again."""

  def __post_init__(self):
    super().__post_init__()
    self._array_retry = Retry()


@pytest.mark.parametrize(
  ('function', 'word'),
  [('rename', r'2\.saving\d+$'), ('replace', r'manifest.*tmp$')],
)
def test_of_several_processes_the_first_names_again(
  tmp_path, monkeypatch, function, word
):
  failing = Failing(getattr(os, function), word, 'ESTALE', failures=1)
  with OneOfSeveral(tmp_path, retrying(2)) as checkpoints:
    checkpoints.save(2, make_state(2, FEW))
    monkeypatch.setattr(os, function, failing)
    checkpoints.wait()
    assert failing.left == 0
    assert restored(checkpoints, FEW).step == 2


@pytest.mark.parametrize(
  ('name', 'tries', 'calls'), [('ESTALE', 2, 2), ('ENOSPC', 3, 1)]
)
def test_a_save_fails_in_the_end(tmp_path, monkeypatch, name, tries, calls):
  save(tmp_path, 1)
  failing = Failing(os.mkdir, '2.saving', name, failures=9)
  monkeypatch.setattr(os, 'mkdir', failing)
  with pytest.raises(CheckpointError, match=r'(?s)checkpoint 2 .*step: 1'):
    save(tmp_path, 2, retrying(tries))
  assert failing.calls == calls


def test_what_is_written_again_is_what_was_given(tmp_path, monkeypatch):
  # By this time the caller has donated its arrays to a later step.
  failing = Failing(os.rename, '2.saving', 'EIO', failures=1)
  monkeypatch.setattr(os, 'rename', failing)
  with Checkpointer(tmp_path, retrying(2, 0.5)) as checkpoints:
    arrays = make_state(2, FEW)
    checkpoints.save(2, arrays)
    for _ in range(3):  # unless its memory is held, this reuses it
      arrays = jax.jit(next_state, donate_argnums=0)(arrays)
    jax.tree.map(lambda x: x.delete(), arrays)
    assert restored(checkpoints, FEW).step == 2
  assert failing.calls > 1


@pytest.mark.parametrize(('failures', 'step'), [(1, 2), (9, 1)])
def test_a_checkpoint_is_read_again_before_it_is_passed_over(
  tmp_path, monkeypatch, failures, step
):
  for number in (1, 2):
    save(tmp_path, number)
  failing = Failing(
    builtins.open, f'{tmp_path}/2/manifest', 'EIO', failures=failures
  )
  monkeypatch.setattr('io.open', failing)
  monkeypatch.setattr(builtins, 'open', failing)
  with Checkpointer(tmp_path, retrying(2)) as checkpoints:
    checkpoint = restored(checkpoints, FEW)
  assert failing.left == max(failures - 2, 0)
  assert checkpoint.step == step
  assert [number for number, _ in checkpoint.skipped] == [2] * (step == 1)


def child(folder: str) -> None:
  with Checkpointer(folder, retrying(3)) as checkpoints:
    if checkpoints.steps():
      restored(checkpoints, FEW)
    else:
      checkpoints.save(1, make_state(1, FEW))
      try:
        checkpoints.wait()
      except CheckpointError as error:
        print(str(error).splitlines()[0])
    print(checkpoints.steps())


@pytest.fixture(scope='module')
def library(tmp_path_factory):
  """C library functions that fail, as tensorstore calls them."""
  compiler = shutil.which('cc')
  if compiler is None or sys.platform != 'linux':
    pytest.skip('needs Linux and a C compiler')
  path = tmp_path_factory.mktemp('library') / 'failing_storage.so'
  command = [compiler, '-shared', '-fPIC', '-o', path, SOURCE, '-ldl']
  subprocess.run(command, check=True, timeout=60)
  return path


def run(library, folder, function, match, name, failures):
  process = start(
    child, folder, LD_PRELOAD=str(library), FUNCTION=function, MATCH=match,
    ERROR=str(getattr(errno, name)), FAILURES=str(failures),
  )  # fmt: skip
  out, errors = process.communicate(timeout=100)
  assert process.returncode == 0, errors
  return out.splitlines()[-1], errors.count('trying again'), out


@pytest.mark.slow
def test_the_array_library_fails_for_good_or_for_a_while(library, tmp_path):
  last, tries, out = run(library, tmp_path, 'fsync', '.saving', 'EIO', 999)
  assert (last, tries) == ('[]', 2)
  assert 'Input/output error' in out
  # Two threads can get one of the two failures each, in the same attempt.
  last, tries, _ = run(library, tmp_path, 'fsync', '.saving', 'EIO', 2)
  assert last == '[1]' and tries in (1, 2)
  last, tries, _ = run(library, tmp_path, 'pread', '/1/', 'ESTALE', 1)
  assert (last, tries) == ('[1]', 1)
