"""Runs commands on this machine: so many at once, stopped cleanly, logged.

An item is one run, of one process or of several that work together. Not here:
what the commands are (`experiments/launch.py`).
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from moe_jax import command_line

_POLL_SECONDS = 0.2
DONE, FAILED, STOPPED, WAITING = 'done', 'failed', 'stopped', 'not started'
_NO_FAILURE = (0, command_line.STOPPED)


@dataclasses.dataclass(frozen=True)
class Job:
  """One item: processes that start and end together.

  Attributes:
    name: For people.
    commands: Makes one a process, when it begins.
    logs: Where each process's output goes, at the end of what is there.
    finished: Whether there is nothing to do, asked at first.
    complete: Whether there is nothing left to do, asked after an end with
      status 0.
    env: Environment variables of the processes.
  """

  name: str
  commands: Callable[[], Sequence[Sequence[str]]]
  logs: Sequence[pathlib.Path]
  finished: Callable[[], bool]
  complete: Callable[[], bool]
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Running:
  """A job's processes, each in a group of its own: Ctrl-C is not theirs."""

  def __init__(self, job: Job, env: Mapping[str, str]):
    self.job = job
    self._files: list[IO[bytes]] = []
    self._processes: list[subprocess.Popen] = []
    for command, log in zip(job.commands(), job.logs, strict=True):
      log.parent.mkdir(parents=True, exist_ok=True)
      file = log.open('ab')
      self._files.append(file)
      self._processes.append(
        subprocess.Popen(
          command,
          stdout=file,
          stderr=subprocess.STDOUT,
          stdin=subprocess.DEVNULL,
          env={**os.environ, **env, **job.env},
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
    """`DONE`, `FAILED` or `STOPPED`, once it has ended."""
    for file in self._files:
      file.close()
    codes = {process.returncode for process in self._processes}
    if not codes <= set(_NO_FAILURE):
      return FAILED
    return DONE if codes == {0} and self.job.complete() else STOPPED

  def signal(self, number: int) -> None:
    """Sends it to every process that is left, and to what they started."""
    for process in self._processes:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, number)


def run_all(
  jobs: Sequence[Job],
  places: Sequence[Mapping[str, str]],
  *,
  grace_seconds: float = 120.0,
  message: Callable[[str], None] = print,
) -> dict[str, str]:
  """Runs every job that is not finished; the outcome of each, by name.

  SIGTERM and Ctrl-C ask the running ones to save and stop, and start no other;
  those that take longer than `grace_seconds`, or a second signal, are killed.

  Args:
    jobs: In the order in which they start.
    places: Environment variables, a set for each job that runs at a time.
    grace_seconds: From asking a job to stop to killing it.
    message: Prints a line.
  """
  outcomes = {job.name: DONE if job.finished() else WAITING for job in jobs}
  queue = [job for job in jobs if outcomes[job.name] == WAITING]
  for job in jobs:
    if job not in queue:
      message(f'{job.name}: finished before')
  running: dict[int, Running] = {}
  killing_at = None
  with _signals() as received:
    while running or (queue and not received):
      for i, env in enumerate(places):
        if i not in running and queue and not received:
          job = queue.pop(0)
          message(f'{job.name}: begins, {job.logs[0]}')
          running[i] = Running(job, env)
      time.sleep(_POLL_SECONDS)
      if received and killing_at is None:
        message('stopping: each run saves, and goes on here another time')
        killing_at = time.monotonic() + grace_seconds
        for process in running.values():
          process.signal(signal.SIGTERM)
      if received and (len(received) > 1 or time.monotonic() > killing_at):
        for process in running.values():
          process.signal(signal.SIGKILL)
      for i in [i for i, process in running.items() if process.ended()]:
        process = running.pop(i)
        name, outcome = process.job.name, process.outcome()
        # Killed on request is no failure of its own.
        if received and outcome == FAILED:
          outcome = STOPPED
        outcomes[name] = outcome
        message(f'{name}: {outcome}')
  return outcomes


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """A list that fills with the SIGINTs and SIGTERMs that arrive."""
  received: list[int] = []
  caught = signal.SIGINT, signal.SIGTERM
  before = [
    signal.signal(number, lambda number, _: received.append(number))
    for number in caught
  ]
  try:
    yield received
  finally:
    for number, handler in zip(caught, before, strict=True):
      signal.signal(number, handler)


def free_port() -> int:
  """A port on this machine that nobody listens on now."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def places(
  workers: int, accelerator: str, devices: int
) -> list[dict[str, str]]:
  """Environment variables of each job that runs at a time.

  Args:
    workers: How many share the machine where no accelerator is split.
    accelerator: 'gpu' or 'tpu': one device a job; '': not split.
    devices: How many of them there are.

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
