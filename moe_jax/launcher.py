"""How a run's processes were started: by flags, or by a launcher."""

import importlib.util
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import InputError

_METADATA = 'computeMetadata/v1/instance/attributes'
_claims: dict[str, socket.socket] = {}  # held until the process ends


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
  # The variables of an indexed Job; JAX asks Kubernetes how many pods it has.
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
    f'http://{host}/{_METADATA}/{key}', headers={'Metadata-Flavor': 'Google'}
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return ''


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
  host, _, port = coordinator.rpartition(':')
  is_number = port.isascii() and port.isdigit() and len(port) < 6
  if not host or not is_number or not 0 < int(port) < 2**16:
    raise InputError(
      f'--coordinator={coordinator!r} is not host:port, of process 0'
    )
  return dict(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
    cluster_detection_method='deactivate',
  )


def claim(coordinator: str, process_id: int) -> None:
  """Claims the number of this process on its machine, and process 0 its port.

  JAX would crash if the port is in use, and abort all processes if two have the
  same number. Two with the same number on two machines are not found here.

  Raises:
    ValueError: Another process has the number or the port.
  """
  port = int(coordinator.rpartition(':')[2])
  flags = f'--coordinator={coordinator} --process_id={process_id}'
  name = f'\0moe_jax {coordinator} {process_id}'
  # On Linux the name is no file's, and ends with the process.
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
