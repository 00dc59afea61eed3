"""The launcher that started a run's processes, read from the environment.

Not here: the number of processes and of this one, which JAX itself finds.
"""

import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Mapping

_METADATA = 'computeMetadata/v1/instance/attributes'


def launcher(environ: Mapping[str, str] | None = None) -> str | None:
  """Name of what started several processes; None for a single process.

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
