"""Runs commands as tasks of the scheduler, with logs.

A task is one run, of one process or of several that work together and are
stopped together.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from experiments.study.scheduler import DONE, FAILED, STOPPED
from moe_jax import cli
from moe_jax.errors import InputError

_NO_FAILURE = (0, cli.STOPPED)
# Environment variables of processes, by name; a place of the scheduler here.
Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Command:
  """A task of one or more processes that start and end together.

  Attributes:
    name: Name of the task in printed lines.
    commands: Returns the command of each process; called when the task begins.
    logs: Files to which the processes' outputs are appended, one for each.
    complete: Returns whether the task is complete; called after all processes
      have ended with status 0.
    env: Environment variables of the processes.
  """

  name: str
  commands: Callable[[], Sequence[Sequence[str]]]
  logs: Sequence[pathlib.Path]
  complete: Callable[[], bool]
  env: Environment = dataclasses.field(default_factory=dict)

  def begin(self, environment: Environment) -> 'Processes':
    """Starts the processes, in a place with these environment variables."""
    return Processes(self, environment)


class Processes:
  """The running processes of a command.

  Each has a process group of its own, so that Ctrl-C does not reach it.
  """

  def __init__(self, command: Command, environment: Environment):
    self._complete = command.complete
    self._files: list[IO[bytes]] = []
    self._processes: list[subprocess.Popen] = []
    for words, log in zip(command.commands(), command.logs, strict=True):
      log.parent.mkdir(parents=True, exist_ok=True)
      file = log.open('ab')
      self._files.append(file)
      self._processes.append(
        subprocess.Popen(
          words,
          stdout=file,
          stderr=subprocess.STDOUT,
          stdin=subprocess.DEVNULL,
          env={**os.environ, **environment, **command.env},
          start_new_session=True,
        )
      )

  def ended(self) -> bool:
    """Whether all processes have ended.

    If one has failed, this sends SIGTERM to the others.
    """
    codes = [process.poll() for process in self._processes]
    if any(code not in (None, *_NO_FAILURE) for code in codes):
      self.signal(signal.SIGTERM)
    return None not in codes

  def outcome(self) -> str:
    """`DONE`, `FAILED` or `STOPPED`; call this once all have ended."""
    for file in self._files:
      file.close()
    codes = {process.returncode for process in self._processes}
    if not codes <= set(_NO_FAILURE):
      return FAILED
    return DONE if codes == {0} and self._complete() else STOPPED

  def signal(self, number: int) -> None:
    """Sends a signal to all processes that still run, and their children."""
    for process in self._processes:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, number)


def free_port() -> int:
  """A port of this machine that is free at present."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def places(
  workers: int, accelerator: str = '', devices: int = 0
) -> list[Environment]:
  """The environment variables of each place; a place runs one task at a time.

  Args:
    workers: Number of places where there is no accelerator to divide.
    accelerator: Kind of devices to divide, 'gpu' or 'tpu', so that a place has
      one; '' divides none.
    devices: Number of those devices.

  Raises:
    ValueError: CUDA_VISIBLE_DEVICES is set and names fewer devices.
  """
  if not accelerator:
    return [{} for _ in range(workers)]
  if accelerator == 'gpu':
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    names = list(map(str, range(devices)))
    if visible is not None:  # use only the devices that the caller was given
      names = [name for name in visible.split(',') if name]
    if len(names) < devices:
      raise InputError(
        f'CUDA_VISIBLE_DEVICES={visible} has {len(names)} devices; --devices='
        f'{devices} are too many'
      )
    return [{'CUDA_VISIBLE_DEVICES': name} for name in names[:devices]]
  # Each process has one chip, which is a topology of its own.
  alone = {
    'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,1,1',
    'TPU_PROCESS_BOUNDS': '1,1,1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  return [{**alone, 'TPU_VISIBLE_CHIPS': str(i)} for i in range(devices)]
