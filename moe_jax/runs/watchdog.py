"""Ends all processes of a run when one of them is lost, and says which.

A process that waits for another in a collective operation waits for ever. So a
thread of each process writes the process' stage to a small file in the folder
`processes` of the workdir. Process 0 reads the files of all other processes.
These read the file of process 0, which has the reason for which all processes
end, if they do. A process is lost if it died (on the machine of process 0),
failed (its file has the error), does not answer (its file does not change), or
has not begun a new stage for so long that all others wait for it.

JAX's own heartbeats stay on. They notice the death of a process later than this
watchdog, and notice neither an error nor an endless loop.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait

import jax
from jax.experimental import multihost_utils

from moe_jax.devices import Timeouts, from_first, is_first
from moe_jax.errors import InputError

FOLDER = 'processes'
TICK_SECONDS = 0.5
# Seconds within which all other processes have read what process 0 writes. A
# process whose collective operation has failed takes a process that is silent
# for longer as lost.
MOMENT_SECONDS = 5.0
# Seconds in which a new file must be seen by all processes: a few times as long
# as network file systems keep a directory's listing.
SHARED_SECONDS = 30.0
# All files have one size and are written in place, so that a full disk does not
# prevent a write; network file systems show new content when a file is opened.
_BYTES, _LONGEST_TEXT = 4096, 800


@dataclasses.dataclass
class Process:
  """The state of one process of a run, which the process writes to its file.

  Attributes:
    machine: Text that is equal for processes of one machine and namespace of
      ids, which alone can see from an id whether the process runs.
    pid: The id of the process.
    stages: Number of stages that the process has begun.
    stage: Name of the last stage, such as 'step 3'.
    failure: The error of the process, which then ends by itself; in the file of
      process 0 also another reason for which all processes end.
    beat: Number of times that the file was written.
    heard: Time at which this process read the file, in seconds of the monotonic
      clock.
  """

  machine: str = ''
  pid: int = 0
  stages: int = 0
  stage: str = 'the start'
  failure: str = ''
  beat: int = 0
  heard: float = dataclasses.field(default_factory=time.monotonic)


@contextlib.contextmanager
def watching(timeouts: Timeouts, workdir: pathlib.Path) -> Iterator['Watchdog']:
  """Watches the processes while the body runs; every process enters this.

  An error in the body of one process ends all others, which print the error.
  Without an error, each process waits at the end of the body for all others. A
  single process is not watched. The body tells the yielded watchdog each stage
  that it enters, and a process that is silent for longer than the timeouts is
  ended, and with it all others.

  Args:
    timeouts: The timeouts of the run.
    workdir: The folder of the run, which process 0 owns.

  Raises:
    ValueError: The processes do not share the folder.
  """
  watchdog = Watchdog(timeouts, workdir / FOLDER)
  if is_first():
    shutil.rmtree(workdir / FOLDER, ignore_errors=True)  # files of a killed run
  if jax.process_count() == 1:
    yield watchdog
    return
  watchdog.start()
  try:
    yield watchdog
    watchdog.finish()
  except BaseException as error:
    watchdog.fail(error)
    raise


class Watchdog:
  """Tells the others this process' stages; ends it if another is lost.

  `folder` is the folder of the files in which processes write their stages.
  """

  def __init__(self, timeouts: Timeouts, folder: pathlib.Path):
    self._index, self._size = jax.process_index(), jax.process_count()
    self._silence = timeouts.heartbeat_timeout_seconds
    # A bucket that is mounted takes about one write of a file in a second.
    self._tick = max(TICK_SECONDS, self._silence / 50)
    self._stall = timeouts.stall_timeout_seconds
    self._folder, self._over = folder, threading.Event()
    self._others = [0] if self._index else list(range(1, self._size))
    # A process knows the states of those whose files it reads, and its own.
    self._processes = {i: Process() for i in [*self._others, self._index]}
    self._this = self._processes[self._index]
    self._this.machine, self._this.pid = _machine(), os.getpid()
    self._num_stages, self._last_move = 0, time.monotonic()

  def start(self) -> None:
    """Waits to see the other processes' files, then starts the watching thread.

    Raises:
      ValueError: The files are not seen, as the processes share no folder.
    """
    self._token = from_first(os.urandom(8).hex())
    self._folder.mkdir(parents=True, exist_ok=True)
    self._file(self._index).touch()
    deadline = time.monotonic() + SHARED_SECONDS
    while unseen := [i for i in self._others if not self._processes[i].beat]:
      if time.monotonic() > deadline:
        shutil.rmtree(self._folder, ignore_errors=True)
        raise InputError(
          f'process {self._index} does not see what process {unseen[0]} writes '
          f'to {self._folder}: --workdir must be on storage that all processes '
          'share'
        )
      time.sleep(0.1)
      with contextlib.suppress(OSError):
        next(self._folder.iterdir(), None)  # makes network file systems refresh
      self._exchange()
    threading.Thread(target=self._watch, name='watchdog', daemon=True).start()

  def mark(self, stage: str) -> None:
    """Reports that this process begins a stage, such as `step 3`.

    All processes have the same stages in the same order, so the process that
    has begun the fewest stages is behind.
    """
    self._this.stage = stage[:_LONGEST_TEXT]
    self._this.stages += 1

  def fail(self, error: BaseException) -> None:
    """Makes the other processes end, with this process' `error` as the reason.

    An error that JAX raises is probably due to the death of another process. So
    this method first gives the watchdog's thread the time to notice that death
    and to end this process because of it.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
      self._silence = min(self._silence, MOMENT_SECONDS)
      time.sleep(3 * MOMENT_SECONDS)
    text = f'process {self._index} failed: {type(error).__name__}: {error}'
    self._this.failure = text[:_LONGEST_TEXT]
    self._over.wait(3 * MOMENT_SECONDS)

  def finish(self) -> None:
    """Waits until all processes have called this method, and stops watching."""
    self.mark('the end')
    multihost_utils.sync_global_devices('the end')
    self._over.set()
    if self._index == 0:
      shutil.rmtree(self._folder, ignore_errors=True)

  def _file(self, index: int) -> pathlib.Path:
    return self._folder / f'{self._token}.{index}'

  def _exchange(self) -> None:
    """Writes this process' file, and reads the files of other processes."""
    self._this.beat += 1
    self._this.heard = time.monotonic()
    text = json.dumps(dataclasses.asdict(self._this), ensure_ascii=False)
    with contextlib.suppress(OSError), self._file(self._index).open('r+b') as f:
      f.write(text.encode(errors='replace').ljust(_BYTES))
    for index in self._others:
      # A file that is being written may not be JSON; it is read again later.
      with contextlib.suppress(OSError, ValueError):
        values = json.loads(self._file(index).read_bytes())
        if values['beat'] != self._processes[index].beat:
          values['heard'] = time.monotonic()
          self._processes[index] = Process(**values)

  def _watch(self) -> None:
    """Watches the other processes until the run is over or has to end.

    This runs on the watchdog's thread. If the thread fails, this process' file
    does not change any more, so that the other processes end the run.
    """
    while not self._over.wait(self._tick):
      self._exchange()
      if reason := self._reason_to_end():
        self._end(reason)

  def _reason_to_end(self) -> str | None:
    """The reason for which this process has to end; None if there is none."""
    if self._index:
      return self._problem(0)
    if reason := next(filter(None, map(self._problem, self._processes)), None):
      return reason
    stages = {i: process.stages for i, process in self._processes.items()}
    if sum(stages.values()) != self._num_stages:
      self._num_stages, self._last_move = sum(stages.values()), time.monotonic()
    if not 0 < self._stall < time.monotonic() - self._last_move:
      return None
    behind = [i for i, n in stages.items() if n == min(stages.values())]
    who = f'process {" and ".join(map(str, behind))}'
    if len(behind) == self._size:
      who = 'all processes'
    stage = self._processes[behind[0]].stage
    return f'nothing moved for {self._stall} s; {who} got only to {stage}'

  def _problem(self, index: int) -> str | None:
    """Why process `index` ends, or how it is lost; None if it runs on.

    The text is a sentence that names the process.
    """
    process = self._processes[index]
    silent = time.monotonic() - process.heard
    if process.failure:
      return process.failure
    if process.machine == self._this.machine and _has_ended(process.pid):
      how = 'died'
    elif silent > self._silence:
      how = f'does not answer, for {silent:.0f} s'
    else:
      return None
    return f'process {index} {how}; it had got to {process.stage}'

  def _end(self, reason: str) -> None:
    """Ends this process, and process 0 first tells all others the reason.

    Process 0 writes the reason to its file and waits until all others have read
    it. A process that has finished or failed is left to end by itself.
    """
    ends_by_itself = self._over.is_set() or self._this.failure
    if self._index == 0:
      self._this.failure = reason
      self._exchange()
      time.sleep(MOMENT_SECONDS)
      shutil.rmtree(self._folder, ignore_errors=True)
    self._over.set()
    if ends_by_itself:
      return
    text = f'moe_jax: process {self._index} of {self._size} ends: {reason}'
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _machine() -> str:
  """The names of this machine and of its namespace of process ids, as text."""
  namespace = pathlib.Path('/proc/self/ns/pid')
  return f'{os.uname().nodename} {namespace.exists() and namespace.readlink()}'


def _has_ended(pid: int) -> bool:
  """Whether a process of this machine is known to have ended."""
  try:
    with open(os.pidfd_open(pid), 'rb', buffering=0) as handle:
      return bool(wait([handle.fileno()], 0))
  except (OSError, AttributeError) as error:  # not all systems tell
    return isinstance(error, ProcessLookupError)
