"""Tasks that are commands: processes of their own, logged, stopped as one.

A task is one run, of one process or of several that work together. Not here:
when a task begins (`scheduler.py`), or what the commands are
(`experiments/launch.py`).
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
from moe_jax import command_line

_NO_FAILURE = (0, command_line.STOPPED)
# Environment variables of the processes that run in one place.
Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Command:
  """Processes that start and end together.

  Attributes:
    name: Name of the task in lines that people read.
    commands: Makes the command of each process, when the task begins.
    logs: File that each process's output is added to.
    complete: Whether there is nothing left to do, asked after all processes
      have ended with status 0.
    env: Environment variables of the processes.
  """

  name: str
  commands: Callable[[], Sequence[Sequence[str]]]
  logs: Sequence[pathlib.Path]
  complete: Callable[[], bool]
  env: Environment = dataclasses.field(default_factory=dict)

  def begin(self, place: Environment) -> 'Processes':
    """Starts the processes."""
    return Processes(self, place)


class Processes:
  """A command's processes, each in a group of its own: Ctrl-C is not theirs."""

  def __init__(self, command: Command, place: Environment):
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
          env={**os.environ, **place, **command.env},
          start_new_session=True,
        )
      )

  def ended(self) -> bool:
    """Whether all have; where one failed, the others are asked to stop."""
    codes = [process.poll() for process in self._processes]
    if any(code not in (None, *_NO_FAILURE) for code in codes):
      self.signal(signal.SIGTERM)
    return None not in codes

  def outcome(self) -> str:
    """`DONE`, `FAILED` or `STOPPED`, once all have ended."""
    for file in self._files:
      file.close()
    codes = {process.returncode for process in self._processes}
    if not codes <= set(_NO_FAILURE):
      return FAILED
    return DONE if codes == {0} and self._complete() else STOPPED

  def signal(self, number: int) -> None:
    """Sends it to every process that is left, and to what they started."""
    for process in self._processes:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, number)


def free_port() -> int:
  """A port on this machine that nobody listens on now."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def places(
  workers: int, accelerator: str = '', devices: int = 0
) -> list[Environment]:
  """A place for each task that runs at a time.

  Args:
    workers: Number of tasks that share the machine where no accelerator is
      split.
    accelerator: 'gpu' or 'tpu' gives each task one device; '' splits none.
    devices: Number of those devices.

  Raises:
    ValueError: CUDA_VISIBLE_DEVICES is set and names fewer.
  """
  if not accelerator:
    return [{} for _ in range(workers)]
  if accelerator == 'gpu':
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    names = list(map(str, range(devices)))
    if visible is not None:  # the caller's share of the machine
      names = [name for name in visible.split(',') if name]
    if len(names) < devices:
      raise ValueError(
        f'CUDA_VISIBLE_DEVICES={visible} has {len(names)} devices; --devices='
        f'{devices} are too many'
      )
    return [{'CUDA_VISIBLE_DEVICES': name} for name in names[:devices]]
  # One chip a process, each a topology of its own.
  alone = {
    'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,1,1',
    'TPU_PROCESS_BOUNDS': '1,1,1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  return [{**alone, 'TPU_VISIBLE_CHIPS': str(i)} for i in range(devices)]
