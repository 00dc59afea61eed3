"""Several processes as one run: start-up, rows of each, values on the host.

Every process runs the same program, on JAX's own multi-controller runtime.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import InputError
from moe_jax.launcher import checked_flags, claim, launcher
from moe_jax.options import Options, at_least, option
from moe_jax.shapes import Int

# Seconds in which a new file must be seen by all processes: a few times as long
# as network file systems keep a directory's listing.
SHARED_SECONDS = 30.0
# Ratio of JAX's own heartbeat timeout to ours, so that ours, which says more,
# is first. JAX may act half of its timeout earlier.
_JAX_TIMEOUTS = 3
# Seconds after which a process says that it waits for others to start.
_NOTE_SECONDS = 15.0
# Seconds that process 0 stays after an error. JAX's service ends with it, and
# others that are still about to say their error would abort with a stack trace.
_LAST_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Timeouts(Options):
  """Timeouts of several processes: the section 'distributed' of a config."""

  initialization_timeout_seconds: int = option(
    300,
    'Seconds within which all processes of the run must have started.',
    at_least(1),
  )
  heartbeat_timeout_seconds: int = option(
    100,
    'Seconds after which a process that does not answer is taken for dead and '
    "all others end. JAX's own timeout, three times as long, is the only one "
    'until the run is being set up.',
    at_least(1),
  )
  stall_timeout_seconds: int = option(
    900,
    'Seconds without progress in any process after which all processes end; it '
    'must be longer than the preparation of the data, a step with its '
    'compilation, an evaluation or a save. With 0 they wait for ever.',
    at_least(0),
  )


def start(
  timeouts: Timeouts,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> bool:
  """Connects to the other processes; to be called before a device is used.

  Without arguments the environment decides (`launcher`); where it names no
  launcher, there is one process, and nothing to connect to. If the others have
  not started in time, this process prints so and ends with status 1.

  Args:
    timeouts: The timeouts of the run.
    coordinator: 'host:port' of process 0, which listens there.
    num_processes: Number of processes of the run.
    process_id: Number of this process, from 0.

  Returns:
    Whether the run has several processes.

  Raises:
    ValueError: Some arguments are missing or out of range.
  """
  flags = checked_flags(coordinator, num_processes, process_id)
  if jax.distributed.is_initialized():
    return jax.process_count() > 1
  if num_processes == 1 or (flags is None and launcher() is None):
    return False
  if flags and coordinator is not None and process_id is not None:
    claim(coordinator, process_id)
  seconds = timeouts.initialization_timeout_seconds
  who = f'process {process_id} of {num_processes}' if flags else launcher()
  address = coordinator or 'the coordinator that JAX found'
  late_message = (
    f'{who}, at {address}: not all processes were there within '
    f'distributed.initialization_timeout_seconds={seconds}'
  )
  note = f'{who} waits for the others, at {address}, for {seconds} s at most'
  alarms = (
    threading.Timer(seconds, _give_up, [late_message]),  # JAX would abort
    threading.Timer(_NOTE_SECONDS, _print_note, [note]),
  )
  for alarm in alarms:
    alarm.daemon = True
    alarm.start()
  try:
    jax.distributed.initialize(
      **flags or {},
      initialization_timeout=2 * seconds,
      heartbeat_timeout_seconds=_JAX_TIMEOUTS
      * timeouts.heartbeat_timeout_seconds,
      shutdown_timeout_seconds=timeouts.heartbeat_timeout_seconds,
    )
  finally:
    for alarm in alarms:
      alarm.cancel()
  if flags and jax.process_count() != num_processes:
    _give_up(
      f'--num_processes={num_processes} of process {process_id}, and '
      f'{jax.process_count()} of process 0: give all the same'
    )
  return jax.process_count() > 1


@contextlib.contextmanager
def joined(*args: Any) -> Iterator[None]:
  """Connects to the other processes while the body runs; see `start`.

  With several processes an error ends this one at once: JAX would first wait
  for the others to disconnect, and they may be lost.

  Args:
    *args: The arguments of `start`.
  """
  several = start(*args)
  try:
    yield
  except BaseException as error:
    if not several:
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
      time.sleep(_LAST_SECONDS)
    status = getattr(error, 'code', 1)
    os._exit(status if isinstance(status, int) else 1)
  if several:
    jax.distributed.shutdown()


def _print_note(text: str) -> None:
  print(f'moe_jax: {text}', file=sys.stderr, flush=True)


def _give_up(reason: str) -> None:
  _print_note(reason)
  os._exit(1)


def is_first() -> bool:
  """Whether this is process 0, which alone prints and writes files."""
  return jax.process_index() == 0


@dataclasses.dataclass(frozen=True)
class Placing:
  """Moves batches of numpy arrays to the devices of all processes.

  The rows that a process needs are read from the sharding, so that devices may
  be in any order; processes may need the same rows (where the mesh axis
  `tensor` spans them).

  Attributes:
    sharding: Sharding of an array [B, ...].
    batch_size: Number B of rows in a global batch.
    microbatches: Number of slices of a batch that evaluations compute one after
      another, as a step does.
  """

  sharding: jax.sharding.Sharding
  batch_size: int
  microbatches: int = 1

  @functools.cached_property
  def rows(self) -> Int[np.ndarray, ' R']:
    """Numbers of the rows that this process' devices hold, ascending."""
    # Only rows matter here, so any size does for the second dimension.
    slices = self.sharding.addressable_devices_indices_map((self.batch_size, 1))
    is_held = np.zeros(self.batch_size, bool)
    for rows, *_ in filter(None, slices.values()):
      is_held[rows] = True
    return np.flatnonzero(is_held)

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Moves a batch of which this process has all rows."""
    if len(self.rows) < self.batch_size:
      batch = {name: values[self.rows] for name, values in batch.items()}
    return self.local(batch)

  def local(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Moves a batch of which this process has only `rows`, in their order."""
    return {name: self._on_devices(values) for name, values in batch.items()}

  def _on_devices(self, values: np.ndarray) -> jax.Array:
    def device_rows(index):
      first, last, _ = index[0].indices(self.batch_size)
      # The rows of one device are consecutive, here as in the batch.
      begin = int(np.searchsorted(self.rows, first))
      return values[(slice(begin, begin + last - first), *index[1:])]

    shape = (self.batch_size, *values.shape[1:])
    return jax.make_array_from_callback(shape, self.sharding, device_rows)


def fetch(tree: Any) -> Any:
  """A tree of whole numpy arrays; every process has to call this."""

  def whole(leaf):
    if isinstance(leaf, jax.Array) and not (
      leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)


def check_same(facts: Mapping[str, str]) -> None:
  """Checks that all processes have the same texts by name; all call this.

  Raises:
    ValueError: Some process has another text than process 0; all raise it.
  """
  if jax.process_count() == 1:
    return
  digests = [hashlib.sha256(v.encode()).digest() for v in facts.values()]
  rows = np.frombuffer(b''.join(digests), np.uint8).reshape(len(facts), -1)
  all_rows = multihost_utils.process_allgather(rows)  # [processes, facts, 32]
  differs = (all_rows != all_rows[0]).any(-1)
  for name, column in zip(facts, differs.T):
    if column.any():
      processes = ', '.join(map(str, np.flatnonzero(column)))
      raise InputError(
        f'{name} of process {processes} is not that of process 0; here, in '
        f'process {jax.process_index()}, it is {facts[name]:.80}'
      )


def from_first(number: float) -> float:
  """The number that process 0 has, to the last bit; every one calls this."""
  if jax.process_count() == 1:
    return number
  number_bytes = np.frombuffer(np.float64(number).tobytes(), np.uint8)
  number_bytes = multihost_utils.broadcast_one_to_all(number_bytes).tobytes()
  return float(np.frombuffer(number_bytes, np.float64)[0])


def check_shared(folder: pathlib.Path) -> None:
  """Checks that all processes see the same folder; every one calls this.

  Args:
    folder: A folder that exists.

  Raises:
    ValueError: This process does not see what process 0 writes there.
  """
  if jax.process_count() == 1:
    return
  token = np.frombuffer(secrets.token_bytes(16), np.uint8)
  token = multihost_utils.broadcast_one_to_all(token).tobytes().hex()
  path = folder / f'.shared-{token}'
  if is_first():
    path.touch()
  start_time = time.monotonic()
  while not path.exists():
    if time.monotonic() - start_time > SHARED_SECONDS:
      raise InputError(
        f'process {jax.process_index()} does not see what process 0 writes to '
        f'{folder}: --workdir must be on storage that all processes share'
      )
    time.sleep(0.1)
    with contextlib.suppress(OSError):
      next(folder.iterdir(), None)  # has a network file system look again
  multihost_utils.sync_global_devices(f'shared {folder}')
  if is_first():
    path.unlink(missing_ok=True)
