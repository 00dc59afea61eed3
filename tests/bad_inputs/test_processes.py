"""Processes that cannot work together: one message, in seconds, no stack."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from moe_jax.devices import checked_flags, claim_process
from moe_jax.runs.ownership import owned
from tests.bad_inputs.cases import assert_message
from tests.programs import free_port, started


@pytest.mark.parametrize(
  ('coordinator', 'num_processes', 'process_id', 'phrase'),
  [
    ('h:65536', 2, 0, 'is not host:port, of process 0'),
    ('http://h', 2, 0, 'is not host:port, of process 0'),
    ('h:1', 0, 0, '--num_processes=0'),
    ('h:1', 2, -1, '--process_id=-1 not in [0, num_processes=2)'),
    ('h:1', 2, None, 'give all three'),
    (None, None, 0, 'give all three'),
  ],
)
def test_flags(coordinator, num_processes, process_id, phrase):
  with pytest.raises(ValueError, match=re.escape(phrase)):
    checked_flags(coordinator, num_processes, process_id)


def test_a_port_in_use():
  with socket.socket() as other:
    other.bind(('', 0))
    other.listen()
    address = f'127.0.0.1:{other.getsockname()[1]}'
    with pytest.raises(ValueError, match=r'_id=0(.|\n)*already in use'):
      claim_process(address, 0)


@pytest.mark.skipif(sys.platform != 'linux', reason='of abstract sockets')
def test_a_number_is_of_one_process():
  address = f'127.0.0.1:{free_port()}'
  claim_process(address, 3)
  claim_process(address, 3)  # this process has it already
  with socket.socket(socket.AF_UNIX) as twin:  # as another process claims it
    twin.bind(f'\0moe_jax {address} 2')
    with pytest.raises(ValueError, match=r'_id=2(.|\n)*same number'):
      claim_process(address, 2)


def run(
  folder, *processes, seconds=20, config='configs/tiny_switch.py:runlocal'
):
  """Trains in processes with these flags; returns each (status, errors)."""
  children = [
    started(
      *('-m', 'moe_jax.main', f'--config={config}'),
      f'--workdir={folder / "run"}',
      f'--config.distributed.initialization_timeout_seconds={seconds}',
      *process_flags,
      env={'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.DEVNULL,
    )
    for process_flags in processes
  ]
  try:
    error_texts = [child.communicate(timeout=200)[1] for child in children]
  finally:
    for child in children:
      child.kill()
  return [(c.returncode, errors) for c, errors in zip(children, error_texts)]


def flags_of(port, process, count=2):
  return (
    f'--coordinator=127.0.0.1:{port}',
    f'--num_processes={count}',
    f'--process_id={process}',
    f'--config.mesh.data={count}',
  )


@pytest.mark.slow
def test_twins_whose_coordinator_does_not_answer(tmp_path):
  """One of them is refused; the other waits as if it were alone."""
  began, port = time.monotonic(), free_port()
  outcomes = run(tmp_path, flags_of(port, 1), flags_of(port, 1), seconds=15)
  assert time.monotonic() - began < 100
  assert [status for status, _ in outcomes] == [1, 1], outcomes
  refused, waited = sorted((errors for _, errors in outcomes), key=has_waited)
  assert_message(refused, ('--process_id=1', 'same number'), 4)
  assert_message(waited, ('not all processes were there',), 4)


def has_waited(errors):
  return 'not all processes' in errors


@pytest.mark.slow
def test_a_workdir_in_use_is_said_by_all_processes(tmp_path):
  """A process that learns this before it has connected reports it, too."""
  port = free_port()
  with owned([tmp_path / 'run']):
    outcomes = run(tmp_path, flags_of(port, 0), flags_of(port, 1), seconds=100)
  for status, errors in outcomes:
    assert status == 1
    assert_message(errors, ('run is in use by', str(os.getpid())), 6)


@pytest.mark.slow
def test_an_error_in_all_processes_is_said_without_a_stack(tmp_path):
  port = free_port()
  flag = '--config.data.source.python_stdlib.modules=no_such_module'
  process_flags = [(*flags_of(port, i), flag) for i in (0, 1)]
  outcomes = run(tmp_path, *process_flags, seconds=100)
  for status, errors in outcomes:
    assert status == 1
    assert_message(errors, (), 6)
  assert any('no_such_module' in errors for _, errors in outcomes), outcomes
  assert not (tmp_path / 'run').exists()
