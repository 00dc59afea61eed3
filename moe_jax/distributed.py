"""Many processes as one run: start-up, whose rows are whose, host values.

The engine is JAX's own multi-controller runtime: every process runs the same
program. Not here: the mesh (`partitioning.py`), and what ends all processes
when one is lost (`runs/watchdog.py`).
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

from moe_jax.launcher import launcher
from moe_jax.options import Options, at_least, option
from moe_jax.shapes import Int

# Of a network file system's directory listings, a few times over.
SHARED_SECONDS = 30.0
# JAX's own heartbeats are for when nobody watches: its beats are half of their
# timeout apart, so it may act that much earlier, and with less to say.
_BEHIND = 3


@dataclasses.dataclass(frozen=True)
class Timeouts(Options):
  """The section 'distributed' of a config."""

  initialization_timeout_seconds: int = option(
    300, 'Seconds in which all processes must have started.', at_least(1)
  )
  heartbeat_timeout_seconds: int = option(
    100,
    'Seconds after which a process that does not answer is taken for dead, and '
    "all the others end. JAX's own timeout is three times as long; it alone "
    'counts until the run is being set up.',
    at_least(1),
  )
  stall_timeout_seconds: int = option(
    900,
    'Seconds after which all processes end if none got further; it must be '
    'longer than the preparation of the data, a step with its compilation, an '
    'evaluation or a save. With 0 they wait for ever.',
    at_least(0),
  )


def start(
  timeouts: Timeouts,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> bool:
  """Joins the other processes; before any device is used.

  Without arguments it is what the environment says (`launcher`), and one
  process where it says nothing: then nothing is connected to. If the others
  are not there in time, this process says so and ends with status 1.

  Args:
    timeouts: How long to wait for the others.
    coordinator: 'host:port' of process 0, which listens there.
    num_processes: How many there are.
    process_id: Which of them this is, from 0.

  Returns:
    Whether there are several.

  Raises:
    ValueError: Some arguments are missing or out of range.
  """
  given = _checked(coordinator, num_processes, process_id)
  if jax.distributed.is_initialized():
    return jax.process_count() > 1
  if num_processes == 1 or (given is None and launcher() is None):
    return False
  seconds = timeouts.initialization_timeout_seconds
  who = f'process {process_id} of {num_processes}' if given else launcher()
  where = coordinator or 'the coordinator that JAX found'
  # JAX would abort, with a stack trace.
  alarm = threading.Timer(
    seconds,
    _give_up,
    [
      f'{who}, at {where}: not all processes were there within '
      f'distributed.initialization_timeout_seconds={seconds}'
    ],
  )
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      **given or {},
      initialization_timeout=2 * seconds,
      heartbeat_timeout_seconds=_BEHIND * timeouts.heartbeat_timeout_seconds,
      shutdown_timeout_seconds=timeouts.heartbeat_timeout_seconds,
    )
  finally:
    alarm.cancel()
  return jax.process_count() > 1


@contextlib.contextmanager
def joined(*args: Any) -> Iterator[None]:
  """The body of a program that may be one of several processes.

  With several, an error ends this one at once: JAX would first wait for the
  others to say goodbye, and they may be lost.

  Args:
    *args: Of `start`.
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
    os._exit(1)
  if several:
    jax.distributed.shutdown()


def _give_up(reason: str) -> None:
  print(f'moe_jax: {reason}', file=sys.stderr, flush=True)
  os._exit(1)


def _checked(coordinator, num_processes, process_id) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None where none is given."""
  flags = {
    '--coordinator': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    return None
  if missing:
    have = [f'{n}={v}' for n, v in flags.items() if v is not None]
    raise ValueError(
      f'{" ".join(have)} without {" and ".join(missing)}: give all three, or '
      'none where the environment tells them (SLURM, Open MPI, TPU pods, GKE)'
    )
  if num_processes < 1:
    raise ValueError(f'--num_processes={num_processes} must be at least 1')
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id} not in [0, num_processes={num_processes})'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ValueError(
      f'--coordinator={coordinator!r} is not host:port, of process 0'
    )
  return dict(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
    cluster_detection_method='deactivate',
  )


def is_first() -> bool:
  """Whether this process is the one that writes and speaks for all."""
  return jax.process_index() == 0


@dataclasses.dataclass(frozen=True)
class Placing:
  """Moves batches of numpy arrays to the devices of all processes.

  Which rows a process must have is read from the sharding, so that any order
  of devices will do: processes that share rows (over `tensor`, say) each have
  them.

  Attributes:
    sharding: Of an array [B, ...].
    batch_size: B, global.
  """

  sharding: jax.sharding.Sharding
  batch_size: int

  @functools.cached_property
  def rows(self) -> Int[np.ndarray, ' R']:
    """The rows of a batch that devices of this process hold, rising."""
    # Its second dimension is whole: only rows matter.
    places = self.sharding.addressable_devices_indices_map((self.batch_size, 1))
    held = np.zeros(self.batch_size, bool)
    for rows, *_ in places.values():
      held[rows] = True
    return np.flatnonzero(held)

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch of which this process has all rows."""
    if len(self.rows) < self.batch_size:
      batch = {name: values[self.rows] for name, values in batch.items()}
    return self.local(batch)

  def local(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch of which this process has `rows` alone, in their order."""
    return {name: self._place(values) for name, values in batch.items()}

  def _place(self, values: np.ndarray) -> jax.Array:
    def part(index):
      first, last, _ = index[0].indices(self.batch_size)
      # Rows of one device follow one another, here as in the batch.
      begin = int(np.searchsorted(self.rows, first))
      return values[(slice(begin, begin + last - first), *index[1:])]

    shape = (self.batch_size, *values.shape[1:])
    return jax.make_array_from_callback(shape, self.sharding, part)


def fetch(tree: Any) -> Any:
  """The arrays as numpy, whole, in every process; all of them call this."""

  def whole(leaf):
    if isinstance(leaf, jax.Array) and not (
      leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)


def check_same(facts: Mapping[str, str]) -> None:
  """Compares what every process must have alike, by name; all call this.

  Raises:
    ValueError: In every process, where one has another than process 0.
  """
  if jax.process_count() == 1:
    return
  digests = [hashlib.sha256(v.encode()).digest() for v in facts.values()]
  mine = np.frombuffer(b''.join(digests), np.uint8).reshape(len(facts), -1)
  all_ = multihost_utils.process_allgather(mine)  # [processes, facts, 32]
  differs = (all_ != all_[0]).any(-1)
  for name, column in zip(facts, differs.T):
    if column.any():
      who = ', '.join(map(str, np.flatnonzero(column)))
      raise ValueError(
        f'{name} of process {who} is not that of process 0; here, in process '
        f'{jax.process_index()}, it is {facts[name]:.80}'
      )


def check_shared(folder: pathlib.Path) -> None:
  """Whether all processes see one folder, which exists; all call this.

  Raises:
    ValueError: Not so, in the processes that do not.
  """
  if jax.process_count() == 1:
    return
  word = np.frombuffer(secrets.token_bytes(16), np.uint8)
  word = multihost_utils.broadcast_one_to_all(word).tobytes().hex()
  path = folder / f'.shared-{word}'
  if is_first():
    path.touch()
  began = time.monotonic()
  while not path.exists():
    if time.monotonic() - began > SHARED_SECONDS:
      raise ValueError(
        f'process {jax.process_index()} does not see what process 0 writes to '
        f'{folder}: --workdir must be on storage that all processes share'
      )
    time.sleep(0.1)
    with contextlib.suppress(OSError):
      next(folder.iterdir(), None)  # has a network file system look again
  multihost_utils.sync_global_devices(f'shared {folder}')
  if is_first():
    path.unlink(missing_ok=True)
