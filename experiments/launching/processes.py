"""Runs commands side by side, with logs, and stops them cleanly.

A command is one process, or several that work together and are stopped
together.
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

from moe_jax import cli
from moe_jax.errors import InputError

DONE, FAILED, STOPPED, WAITING = 'done', 'failed', 'stopped', 'not started'
_POLL_SECONDS = 0.05
# Environment variables of processes, by name.
Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Command:
  """One or more processes that start and end together.

  Attributes:
    name: Name of the command in printed lines.
    commands: Returns the words of each process; called when it is started.
    logs: Files to which the processes' outputs are appended, one for each.
    done: Function that is called once all processes have ended with status 0.
    env: Environment variables of the processes.
  """

  name: str
  commands: Callable[[], Sequence[Sequence[str]]]
  logs: Sequence[pathlib.Path]
  done: Callable[[], None]
  env: Environment = dataclasses.field(default_factory=dict)


class Processes:
  """Processes that work together.

  Each has a process group of its own, so that Ctrl-C does not reach it.

  Attributes:
    all: The processes, running or ended.
  """

  def __init__(self, processes: Sequence[subprocess.Popen]):
    """Takes processes that `start` has started."""
    self.all = processes

  def running(self) -> list[subprocess.Popen]:
    """The processes that have not ended."""
    return [process for process in self.all if process.poll() is None]

  def send(
    self, number: int, to: Sequence[subprocess.Popen] | None = None
  ) -> None:
    """Sends a signal to processes that still run, and to their children.

    Args:
      number: Number of the signal.
      to: The processes that receive it; None is all of them.
    """
    for process in self.all if to is None else to:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, number)

  def wait(self, seconds: float) -> bool:
    """Waits for all processes; kills those that have not ended in time.

    Returns:
      Whether all ended in time.
    """
    deadline = time.monotonic() + seconds
    while self.running() and time.monotonic() < deadline:
      time.sleep(_POLL_SECONDS)
    in_time = not self.running()
    self.send(signal.SIGKILL)
    for process in self.all:
      process.wait()
    return in_time


def start(
  words: Sequence[str], log: pathlib.Path, variables: Environment
) -> subprocess.Popen:
  """Starts a process in a process group of its own.

  Args:
    words: The program and its arguments.
    log: File that its output is appended to.
    variables: Further variables of its environment.
  """
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open('ab') as file:
    return subprocess.Popen(
      words,
      stdout=file,
      stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL,
      env={**os.environ, **variables},
      start_new_session=True,
    )


def run_all(
  commands: Sequence[Command],
  environments: Sequence[Environment],
  grace_seconds: float = 120.0,
  message: Callable[[str], None] = print,
) -> dict[str, str]:
  """Runs every command and returns the outcome of each, by name.

  A command that fails does not stop the others; where one of its processes has
  failed, the others of the command get SIGTERM. At SIGTERM or Ctrl-C no further
  one begins, and those that run are asked to save and stop; they are killed if
  they take longer than `grace_seconds`, or at a second signal.

  Args:
    commands: The commands, in the order in which they begin.
    environments: Environment variables of each place in which one command runs
      at a time.
    grace_seconds: Seconds from asking a command to stop to killing it.
    message: Function that prints a line.
  """
  outcomes = {command.name: WAITING for command in commands}
  queue = list(commands)
  running: dict[int, tuple[Command, Processes]] = {}

  def send(number):
    for _, processes in running.values():
      processes.send(number)

  killing_at = None
  with _signals() as received:
    while running or (queue and not received):
      for i, environment in enumerate(environments):
        if i not in running and queue and not received:
          command = queue.pop(0)
          message(f'{command.name}: starts')
          variables = {**environment, **command.env}
          pairs = zip(command.commands(), command.logs, strict=True)
          started = [start(words, log, variables) for words, log in pairs]
          running[i] = command, Processes(started)
      if received and killing_at is None:
        message('stopping: each run saves, and the same command goes on')
        killing_at = time.monotonic() + grace_seconds
        send(signal.SIGTERM)
      if received and (len(received) > 1 or time.monotonic() > killing_at):
        send(signal.SIGKILL)
      for i, (command, processes) in list(running.items()):
        codes = {process.poll() for process in processes.all}
        failed = not codes <= {None, 0, cli.STOPPED}
        if None in codes:
          if failed:
            processes.send(signal.SIGTERM)
          continue
        del running[i]
        if codes == {0}:
          command.done()
        # A command that was killed because the user stops has not failed.
        ended = FAILED if failed and not received else STOPPED
        outcomes[command.name] = DONE if codes == {0} else ended
        message(f'{command.name}: {outcomes[command.name]}')
      if running:
        time.sleep(_POLL_SECONDS)
  return outcomes


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Catches SIGINT and SIGTERM; yields the list of those received so far."""
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
