"""The environment variables of several processes, launcher by launcher."""

import http.server
import threading

import pytest

from moe_jax.devices import launcher

SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}
NO_TPU = {'TPU_SKIP_MDS_QUERY': '1'}


@pytest.mark.parametrize(
  ('environ', 'expected'),
  [
    ({}, None),
    (SLURM, 'SLURM'),
    # A batch script without srun has the job's list of nodes and none of a
    # step.
    ({k: v for k, v in SLURM.items() if 'STEP' not in k}, None),
    (SLURM | {'SLURM_NTASKS': '1'}, None),
    ({'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_MCA_orte_hnp_uri': 'x'}, 'Open MPI'),
    ({'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_MCA_orte_hnp_uri': 'x'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}, 'GKE'),
    ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, None),
    ({'MEGASCALE_NUM_SLICES': '2', 'TPU_WORKER_HOSTNAMES': 'a'}, 'GKE'),
    ({'KUBERNETES_SERVICE_HOST': 'k'}, None),
    (
      {'KUBERNETES_SERVICE_HOST': 'k', 'JOB_COMPLETION_INDEX': '0'},
      'Kubernetes',
    ),
  ],
)
def test_the_environment_tells(environ, expected):
  assert launcher(NO_TPU | environ) == expected


@pytest.mark.parametrize(
  ('answers', 'expected'),
  [
    ({'worker-network-endpoints': 'h0'}, None),
    ({'worker-network-endpoints': 'h0,h1'}, 'a TPU pod'),
    (
      {
        'worker-network-endpoints': 'h0',
        'tpu-env': "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n",
      },
      'a TPU pod',
    ),
    ({}, None),
  ],
)
def test_machines_with_tpu_chips_ask_for_their_pod(
  answers, expected, tmp_path, monkeypatch
):
  (tmp_path / 'libtpu.py').touch()  # such machines have this library
  monkeypatch.syspath_prepend(tmp_path)

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      text = answers.get(self.path.rsplit('/', 1)[1])
      self.send_response(404 if text is None else 200)
      self.end_headers()
      self.wfile.write((text or '').encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(('127.0.0.1', 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'127.0.0.1:{server.server_address[1]}'
    assert launcher({'GCE_METADATA_IP': address}) == expected
    # A process on such a machine's CPU is alone.
    cpu = {'GCE_METADATA_IP': address, 'JAX_PLATFORMS': 'cpu'}
    assert launcher(cpu) is None
    server.shutdown()
