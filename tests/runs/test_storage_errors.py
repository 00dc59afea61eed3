"""Storage errors that pass are retried, and those that do not are reported."""

import builtins
import errno
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.runs import storage_errors
from moe_jax.runs.checkpointer import Checkpointer, CheckpointError
from moe_jax.runs.retention import CheckpointOptions
from moe_jax.runs.storage_errors import Retry, is_transient
from tests import programs

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


def state(step):
  w = np.random.default_rng(step).random(3000, 'float32')
  return {'w': jnp.asarray(w), 'step': jnp.int32(step)}


ABSTRACT = {
  'w': jax.ShapeDtypeStruct((3000,), jnp.float32),
  'step': jax.ShapeDtypeStruct((), jnp.int32),
}


def next_state(arrays):
  return jax.tree.map(lambda x: x * 3 + 1, arrays)


def restored(checkpoints):
  checkpoint = checkpoints.restore(ABSTRACT)
  jax.tree.map(
    np.testing.assert_array_equal, checkpoint.state, state(checkpoint.step)
  )
  return checkpoint


def save(folder, step, options=CheckpointOptions()):
  with Checkpointer(folder, options) as checkpoints:
    checkpoints.save(step, state(step))


@pytest.mark.parametrize('function', ['mkdir', 'rename'])
def test_a_save_is_tried_again(tmp_path, monkeypatch, caplog, function):
  # Folders are made before arrays are written, and renamed afterwards.
  failing = Failing(getattr(os, function), '2.saving', 'ESTALE', failures=2)
  monkeypatch.setattr(os, function, failing)
  save(tmp_path, 2, retrying(3))
  assert failing.left == 0
  monkeypatch.undo()
  with Checkpointer(tmp_path) as checkpoints:
    assert restored(checkpoints)[2:] == (2, [])
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
    checkpoints.save(2, state(2))
    monkeypatch.setattr(os, function, failing)
    checkpoints.wait()
    assert failing.left == 0
    assert restored(checkpoints).step == 2


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
    arrays = state(2)
    checkpoints.save(2, arrays)
    for _ in range(3):  # unless its memory is held, this reuses it
      arrays = jax.jit(next_state, donate_argnums=0)(arrays)
    jax.tree.map(lambda x: x.delete(), arrays)
    assert restored(checkpoints).step == 2
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
    checkpoint = restored(checkpoints)
  assert failing.left == max(failures - 2, 0)
  assert checkpoint.step == step
  assert [number for number, _ in checkpoint.skipped] == [2] * (step == 1)


def child(folder: str) -> None:
  with Checkpointer(folder, retrying(3)) as checkpoints:
    if checkpoints.steps():
      restored(checkpoints)
    else:
      checkpoints.save(1, state(1))
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
  env = {
    'JAX_PLATFORMS': 'cpu', 'LD_PRELOAD': str(library), 'FUNCTION': function,
    'MATCH': match, 'ERROR': str(getattr(errno, name)),
    'FAILURES': str(failures),
  }  # fmt: skip
  module = 'tests.runs.test_storage_errors'
  code = f'import {module} as m; m.child({str(folder)!r})'
  proc = programs.run('-c', code, env=env)
  assert proc.returncode == 0, proc.stderr
  return proc.stdout.splitlines()[-1], proc.stderr.count('trying again'), proc


@pytest.mark.slow
def test_the_array_library_fails_for_good_or_for_a_while(library, tmp_path):
  last, tries, proc = run(library, tmp_path, 'fsync', '.saving', 'EIO', 999)
  assert (last, tries) == ('[]', 2)
  assert 'Input/output error' in proc.stdout
  # Two threads can get one of the two failures each, in the same attempt.
  last, tries, _ = run(library, tmp_path, 'fsync', '.saving', 'EIO', 2)
  assert last == '[1]' and tries in (1, 2)
  last, tries, _ = run(library, tmp_path, 'pread', '/1/', 'ESTALE', 1)
  assert (last, tries) == ('[1]', 1)
