"""Connects processes, places batches on devices, keeps compiled programs.

The memory of devices and of this machine is read here, too.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import socket
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.config import Options, option
from moe_jax.errors import InputError
from moe_jax.shapes import Int

T = TypeVar('T')
OFF = 'off'
MOST_BYTES = 2 * 2**30
PROGRAMS_HELP = (
  'Folder of compiled programs, which a later start need not compile again. By '
  "default it is $JAX_COMPILATION_CACHE_DIR, or else 'compiled' in "
  '$MOE_JAX_CACHE or ~/.cache/moe_jax, where what was not used for longest is '
  f'deleted beyond {MOST_BYTES // 2**30} GiB, and several processes keep none; '
  f'{OFF!r}: no program is kept.'
)
_NOT_KEPT = 'compiled programs are not kept'
_claims: dict[str, socket.socket] = {}  # held until the process ends


@dataclasses.dataclass(frozen=True)
class Timeouts(Options):
  """Timeouts of several processes: the section 'distributed' of a config."""

  initialization_timeout_seconds: int = option(
    300,
    'Seconds within which all processes of the run must have started.',
    minimum=1,
  )
  heartbeat_timeout_seconds: int = option(
    100,
    'Seconds after which a process that does not answer is taken for dead and '
    "all others end. JAX's own timeout, three times as long, is the only one "
    'until the run is being set up.',
    minimum=1,
  )
  stall_timeout_seconds: int = option(
    900,
    'Seconds without progress in any process after which all processes end; it '
    'must be longer than the preparation of the data, a step with its '
    'compilation, an evaluation or a save. With 0 they wait for ever.',
    minimum=0,
  )


def connect(
  timeouts: Timeouts,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> bool:
  """Connects to the other processes; to be called before a device is used.

  Without arguments the environment decides (`launcher`); where it names no
  launcher, there is one process, and nothing to connect to. If the other
  processes have not started in time, this process prints so and ends with
  status 1.

  Args:
    timeouts: The timeouts of the run.
    coordinator: 'host:port' of process 0, which listens there.
    num_processes: Number of processes of the run.
    process_id: Index of this process, from 0.

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
    claim_process(coordinator, process_id)
  seconds = timeouts.initialization_timeout_seconds
  who = f'process {process_id} of {num_processes}' if flags else launcher()
  address = coordinator or 'the coordinator that JAX found'
  late_message = (
    f'{who}, at {address}: not all processes were there within '
    f'distributed.initialization_timeout_seconds={seconds}'
  )
  note = f'{who} waits for the others, at {address}, for {seconds} s at most'
  alarms = (
    threading.Timer(seconds, _give_up, [late_message]),  # before JAX aborts
    threading.Timer(15.0, _print_note, [note]),
  )
  for alarm in alarms:
    alarm.daemon = True
    alarm.start()
  try:
    jax.distributed.initialize(
      **flags or {},
      initialization_timeout=2 * seconds,
      # JAX may act after half of its timeout. The run's own watchdog, which
      # says more about the cause, is to act before that.
      heartbeat_timeout_seconds=3 * timeouts.heartbeat_timeout_seconds,
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
def connected(*args: Any) -> Iterator[None]:
  """Connects to the other processes, by `connect`, while the body runs.

  With several processes an error ends this process at once: JAX would first
  wait for the other processes to disconnect, and they may be lost.

  Args:
    *args: The timeouts, and the flags or None, in the order of `connect`.
  """
  several = connect(*args)
  try:
    yield
  except BaseException as error:
    if not several:
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # JAX's service ends with process 0, which waits here: processes that have
    # yet to report their error would abort with a stack trace.
    if is_first():
      time.sleep(2.0)
    status = getattr(error, 'code', 1)
    os._exit(status if isinstance(status, int) else 1)
  if several:
    jax.distributed.shutdown()


def _print_note(text: str) -> None:
  print(f'moe_jax: {text}', file=sys.stderr, flush=True)


def _give_up(reason: str) -> None:
  _print_note(reason)
  os._exit(1)


def checked_flags(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None where no flag is given.

  Raises:
    ValueError: Some flags are missing or out of range.
  """
  flags = {
    '--coordinator': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    return None
  if num_processes is None or process_id is None or coordinator is None:
    have = [f'{n}={v}' for n, v in flags.items() if v is not None]
    raise InputError(
      f'{" ".join(have)} without {" and ".join(missing)}: give all three, or '
      'none where the environment tells them (SLURM, Open MPI, TPU pods, GKE)'
    )
  if num_processes < 1:
    raise InputError(f'--num_processes={num_processes} must be at least 1')
  if not 0 <= process_id < num_processes:
    raise InputError(
      f'--process_id={process_id} not in [0, num_processes={num_processes})'
    )
  port = re.fullmatch(r'.+:(\d{1,5})', coordinator, re.ASCII)
  if not port or not 0 < int(port[1]) < 2**16:
    raise InputError(
      f'--coordinator={coordinator!r} is not host:port, of process 0'
    )
  return dict(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
    cluster_detection_method='deactivate',
  )


def claim_process(coordinator: str, process_id: int) -> None:
  """Claims this process' index on its machine; process 0 also tries its port.

  JAX would crash if the port is in use, and abort all processes if two have the
  same index. Two processes with the same index on two machines are not found
  here.

  Raises:
    ValueError: Another process has the index or the port.
  """
  port = int(coordinator.rpartition(':')[2])
  flags = f'--coordinator={coordinator} --process_id={process_id}'
  name = f'\0moe_jax {coordinator} {process_id}'
  # On Linux a socket whose name begins with a null byte is in no folder, and
  # its name is free again when the process ends.
  if sys.platform == 'linux' and name not in _claims:
    name_socket = socket.socket(socket.AF_UNIX)
    try:
      name_socket.bind(name)
    except OSError:
      raise InputError(
        f'{flags}: another process of this machine has the same number; each '
        'needs its own, from 0'
      ) from None
    _claims[name] = name_socket
  if process_id:
    return
  try:
    socket.create_server(('', port)).close()
  except OSError as error:
    raise InputError(
      f'{flags}: process 0 cannot listen at port {port}: '
      f'{os.strerror(error.errno or 0)}; choose another'
    ) from None


def launcher(environ: Mapping[str, str] | None = None) -> str | None:
  """The launcher that started several processes; None for a single one.

  On a machine with TPU chips Google Cloud's metadata server is asked; no other
  machine sends a request.

  Args:
    environ: Environment variables; None reads those of this process.
  """
  env = os.environ if environ is None else environ

  def number(name):
    return int(env[name]) if env.get(name, '').isdigit() else 0

  slurm = ('JOB_ID', 'STEP_NODELIST', 'PROCID', 'LOCALID')
  workers = env.get('TPU_PROCESS_ADDRESSES', env.get('TPU_WORKER_HOSTNAMES'))
  if 'OMPI_MCA_orte_hnp_uri' in env and number('OMPI_COMM_WORLD_SIZE') > 1:
    return 'Open MPI'
  if all(f'SLURM_{n}' in env for n in slurm) and number('SLURM_NTASKS') > 1:
    return 'SLURM'
  if (workers or '').count(',') or number('MEGASCALE_NUM_SLICES') > 1:
    return 'GKE'
  # These are the variables of an indexed Job of Kubernetes. JAX asks Kubernetes
  # how many pods the Job has, so that a Job of one pod need not be told apart.
  if 'KUBERNETES_SERVICE_HOST' in env and 'JOB_COMPLETION_INDEX' in env:
    return 'Kubernetes'
  return 'a TPU pod' if workers is None and _in_tpu_pod(env) else None


def _in_tpu_pod(env: Mapping[str, str]) -> bool:
  # Importing JAX sets TPU_SKIP_MDS_QUERY where there are no TPU chips.
  if 'TPU_SKIP_MDS_QUERY' in env or not importlib.util.find_spec('libtpu'):
    return False
  if env.get('JAX_PLATFORMS', 'tpu').split(',')[0] != 'tpu':
    return False
  workers = _metadata('worker-network-endpoints', env).count(',') + 1
  slices = [
    line.partition(':')[2].strip(" '")
    for line in _metadata('tpu-env', env).splitlines()
    if line.startswith('MEGASCALE_NUM_SLICES')
  ]
  return workers > 1 or any(n.isdigit() and int(n) > 1 for n in slices)


def _metadata(key: str, env: Mapping[str, str]) -> str:
  host = env.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
    f'http://{host}/computeMetadata/v1/instance/attributes/{key}',
    headers={'Metadata-Flavor': 'Google'},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return ''


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
    """Indices of the rows that this process' devices hold, ascending."""
    # Only rows matter here, so any size does for the second dimension.
    slices = self.sharding.addressable_devices_indices_map((self.batch_size, 1))
    is_held = np.zeros(self.batch_size, bool)
    for rows, *_ in filter(None, slices.values()):
      is_held[rows] = True
    return np.flatnonzero(is_held)

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Moves a batch of which this process has all rows, to global arrays."""
    if len(self.rows) < self.batch_size:
      batch = {name: values[self.rows] for name, values in batch.items()}
    return self.local(batch)

  def local(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Moves a batch of which this process has only some rows.

    The rows are those whose indices `rows` has, in the same order. The results
    are global arrays, of `batch_size` rows.
    """
    place = jax.make_array_from_process_local_data
    return {
      name: place(self.sharding, values, (self.batch_size, *values.shape[1:]))
      for name, values in batch.items()
    }


def fetch(tree: Any) -> Any:
  """The tree with each array gathered in numpy; all processes call this."""

  def whole(leaf):
    if isinstance(leaf, jax.Array) and not (
      leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)


def check_same(facts: Mapping[str, str]) -> None:
  """Checks that named texts are the same in all processes, which all call this.

  Raises:
    ValueError: Some process has another text than process 0; all processes
      raise this error.
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


def from_first(value: T) -> T:
  """The number or text of process 0, to the last bit; every process calls this.

  Of a text only the first 2,000 characters are given.
  """
  if jax.process_count() == 1:
    return value
  kept = value[:2000] if isinstance(value, str) else value
  content = json.dumps(kept, ensure_ascii=False, default=float).encode()
  content_bytes = np.frombuffer(content.ljust(2**14), np.uint8)
  content_bytes = multihost_utils.broadcast_one_to_all(content_bytes)
  return json.loads(content_bytes.tobytes())


def check_room(
  needs: Iterable[tuple[str, int]], devices: Sequence[jax.Device] | None = None
) -> None:
  """Raises ValueError where bytes are more than the devices have together.

  Args:
    needs: Texts on what needs memory, each with a number of bytes.
    devices: The devices. Default: all of JAX's.
  """
  devices = jax.devices() if devices is None else devices
  room = memory_of(devices)
  for purpose, num_bytes in needs:
    if room and num_bytes > room:
      kind = devices[0].device_kind
      raise InputError(
        f'{purpose}: at least {in_bytes(num_bytes)}, and {len(devices)} '
        f'devices of kind {kind!r} have {in_bytes(room)} of memory together; '
        'make it smaller, or take more devices'
      )


def memory_of(devices: Sequence[jax.Device]) -> int:
  """Bytes of memory of all `devices`; 0 where the number is not known.

  CPU devices of one process share the memory of the machine.
  """
  if devices[0].platform == 'cpu':
    return host_bytes() * len({device.process_index for device in devices})
  local_devices = [d for d in devices if d.process_index == jax.process_index()]
  try:
    stats = (local_devices[0].memory_stats() if local_devices else None) or {}
  except (RuntimeError, NotImplementedError):  # a described topology
    return 0
  return stats.get('bytes_limit', 0) * len(devices)


def host_bytes(
  limit_file: pathlib.Path = pathlib.Path('/sys/fs/cgroup/memory.max'),
) -> int:
  """Bytes of the machine's memory, or fewer where Linux limits the process.

  Args:
    limit_file: File with the limit of the process' control group: a number of
      bytes, or 'max'.
  """
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  try:
    limit = limit_file.read_text().strip()
  except OSError:
    return physical
  return min(physical, int(limit)) if limit.isdigit() else physical


def in_bytes(n: int) -> str:
  """A number of bytes with a unit, a power of ten: 93405585408 is '93.4 GB'."""
  for unit, size in (('TB', 1e12), ('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if n >= size:
      return f'{n / size:.3g} {unit}'
  return f'{n} B'


def keep_freed_memory() -> bool:
  """Makes glibc keep freed memory and reuse it; returns whether it does.

  XLA's CPU backend allocates a step's temporaries anew at every step. Above 32
  MiB glibc maps them from the system and unmaps them at the end, so that each
  step pays a page fault for every 4 KiB. The price is that resident memory
  stays at its peak, and that threads wait for each other to allocate. Without
  glibc, or where the backend is no CPU, nothing is changed.
  """
  if not sys.platform.startswith('linux') or not _cpu_is_backend():
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  # Numbers from glibc's malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, and
  # M_ARENA_MAX, one arena for all threads: an arena of one thread alone would
  # hold at most 64 MiB.
  settings = ((-3, 2**31 - 1), (-1, 2**31 - 1), (-8, 1))
  return all([mallopt(name, value) for name, value in settings])


def _cpu_is_backend() -> bool:
  """Whether JAX will run on the CPU, judged without starting its backends."""
  if platforms := os.environ.get('JAX_PLATFORMS'):
    return platforms.split(',')[0] == 'cpu'
  drivers = ('nvidiactl', 'dxg', 'kfd', 'accel[0-9]*', 'vfio/[0-9]*')
  return not any(any(pathlib.Path('/dev').glob(name)) for name in drivers)


def forget_programs(most_regions: int = 20_000) -> None:
  """Clears JAX's compiled programs if the process has many mapped regions.

  Linux allows a process 65,530 regions, of which each program that XLA compiled
  for a CPU takes a few. When none is left, XLA ends the process, or raises an
  error that says "Failed to materialize symbols". A process that trains many
  models calls this between them. Elsewhere than on Linux nothing is cleared.

  Args:
    most_regions: The number of regions up to which nothing is cleared.
  """
  regions = pathlib.Path('/proc/self/maps')
  if regions.exists() and regions.read_bytes().count(b'\n') > most_regions:
    jax.clear_caches()


def cache_root(cache_dir: str = '') -> pathlib.Path:
  """The folder `cache_dir`, else $MOE_JAX_CACHE, else ~/.cache/moe_jax."""
  root = cache_dir or os.environ.get('MOE_JAX_CACHE') or '~/.cache/moe_jax'
  return pathlib.Path(root).expanduser()


def keep_programs(folder: str = '') -> str:
  """Makes this process keep compiled programs; call it before any is compiled.

  A folder that JAX was told of (by $JAX_COMPILATION_CACHE_DIR) is left as it
  is, and $JAX_ENABLE_COMPILATION_CACHE=false is obeyed. The default folder is
  made, and its least recently used files are deleted beyond `MOST_BYTES`; no
  file is deleted elsewhere. Several processes keep programs only in a folder
  that was given. Hosts may have homes of their own, and so default folders of
  their own: some processes would then find a program that others have to
  compile, and wait for these.

  Args:
    folder: A path; OFF, to keep none; '' is the default of `PROGRAMS_HELP`.

  Returns:
    A sentence that says why programs are not kept, for the user to read; ''
    where they are, or where the user wants it so.
  """
  if folder == OFF:
    jax.config.update('jax_enable_compilation_cache', False)
    return ''
  if not jax.config.values['jax_enable_compilation_cache']:
    return folder and f'{_NOT_KEPT}: JAX_ENABLE_COMPILATION_CACHE is false'
  jax_folder = jax.config.values['jax_compilation_cache_dir']
  if not folder and (jax_folder or jax.distributed.is_initialized()):
    return ''
  if '://' not in folder:
    try:
      path = pathlib.Path(folder or cache_root() / 'compiled').expanduser()
      path.mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # the latter if there is no home
      return f'{_NOT_KEPT}: {error}'
    if not folder:
      _delete_oldest(path)
    folder = str(path)
  jax.config.update('jax_compilation_cache_dir', folder)
  least_seconds = 'jax_persistent_cache_min_compile_time_secs'
  if least_seconds.upper() not in os.environ:
    jax.config.update(least_seconds, 0.1)
  return ''


def _delete_oldest(folder: pathlib.Path) -> None:
  """Deletes the least recently used programs beyond `MOST_BYTES` in all."""
  programs = []
  for path in folder.glob('*-cache'):
    with contextlib.suppress(OSError):  # another process has deleted it
      stat = path.stat()
      last_used = max(stat.st_mtime, stat.st_atime)
      programs.append((last_used, stat.st_size, path))
  total = 0
  for _, size, path in sorted(programs, reverse=True):
    total += size
    if total > MOST_BYTES:
      with contextlib.suppress(OSError):
        path.unlink()
