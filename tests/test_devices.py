"""Devices and processes: flags, rows of a batch, launchers, kept programs."""

import http.server
import os
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from moe_jax import devices
from moe_jax.devices import (
  OFF,
  Timeouts,
  connect,
  host_bytes,
  keep_programs,
  launcher,
)

TIMEOUTS = Timeouts()


def test_one_process_connects_to_nothing(monkeypatch):
  for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
    monkeypatch.delenv(name, raising=False)
  assert not connect(TIMEOUTS)
  assert not connect(TIMEOUTS, '192.0.2.1:1', 1, 0)
  assert not jax.distributed.is_initialized()


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


@pytest.mark.parametrize(
  ('file_text', 'expected'), [('4096\n', 4096), ('max\n', None), (None, None)]
)
def test_a_limit_of_the_process_group_counts(tmp_path, file_text, expected):
  file = tmp_path / 'memory.max'
  if file_text is not None:
    file.write_text(file_text)
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert host_bytes(file) == (expected or physical)


SETTINGS = (
  'jax_compilation_cache_dir',
  'jax_enable_compilation_cache',
  'jax_persistent_cache_min_compile_time_secs',
)


@pytest.fixture
def jax_without_settings(monkeypatch):
  """Resets JAX's settings for a test, and restores those of the others."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  jax.config.update('jax_compilation_cache_dir', None)
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


fresh_jax = pytest.mark.usefixtures('jax_without_settings')


def run_program(x):
  """The outputs of a program that is compiled, or found on disk."""
  # JAX keeps programs by their function, which is another in each call.
  return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x.T))(x))


def programs_in(folder):
  """The programs in a folder, with the time at which each was written."""
  return {path.name: path.stat().st_mtime_ns for path in folder.glob('*-cache')}


@fresh_jax
def test_a_program_is_found_again_and_computes_the_same_bits(tmp_path):
  x = np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7)
  assert keep_programs(str(tmp_path / 'kept')) == ''
  compiled = run_program(x)
  programs = programs_in(tmp_path / 'kept')
  assert programs
  events = []
  jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
  np.testing.assert_array_equal(run_program(x), compiled)
  assert '/jax/compilation_cache/cache_hits' in events
  # A file that was cut short costs a warning and the time of compiling.
  for name in programs:
    (tmp_path / 'kept' / name).write_bytes(b'cut')
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    np.testing.assert_array_equal(run_program(x), compiled)
  assert any('persistent compilation cache' in str(w.message) for w in caught)


@fresh_jax
def test_a_folder_that_jax_was_told_of_is_left_as_it_is(tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
  assert keep_programs() == ''
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'own')
  assert not (tmp_path / 'own').exists()
  assert keep_programs(str(tmp_path / 'flag')) == ''
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'flag')


@fresh_jax
def test_a_place_that_has_no_effect_is_said(tmp_path, monkeypatch):
  jax.config.update('jax_enable_compilation_cache', False)
  assert 'JAX_ENABLE_COMPILATION_CACHE' in keep_programs(str(tmp_path))
  assert keep_programs() == ''
  jax.config.update('jax_enable_compilation_cache', True)
  # Hosts of a run with several processes may have no folder in common.
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  assert keep_programs() == ''
  assert not (tmp_path / 'compiled').exists()
  assert keep_programs(str(tmp_path / 'shared')) == ''
  assert (tmp_path / 'shared').exists()


@fresh_jax
def test_it_can_be_turned_off_and_does_without_a_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  assert keep_programs(OFF) == ''
  run_program(np.ones((2, 3)))
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').touch()
  problem = keep_programs(str(tmp_path / 'file' / 'below'))
  assert problem.startswith('compiled programs are not kept: ')
  assert jax.config.jax_compilation_cache_dir is None
  assert run_program(np.ones((2, 3))).shape == (2, 2)


@fresh_jax
def test_the_oldest_programs_are_deleted_beyond_the_bound(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(devices, 'MOST_BYTES', 10)
  for age, name in enumerate(('new', 'middle', 'old')):
    path = tmp_path / f'{name}-cache'
    path.write_bytes(b'four')
    os.utime(path, (1000 - age, 1000 - age))
  (tmp_path / 'another').write_bytes(b'a file that is no program')
  assert keep_programs(str(tmp_path)) == ''
  assert len(list(tmp_path.iterdir())) == 4  # the user's folder stays whole
  folder = tmp_path / 'compiled'
  folder.mkdir()
  for path in list(tmp_path.glob('*-cache')):
    path.rename(folder / path.name)
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  jax.config.update('jax_compilation_cache_dir', None)
  assert keep_programs() == ''
  # The default place is below the root of the cache.
  assert jax.config.jax_compilation_cache_dir == str(folder)
  names = sorted(path.name for path in folder.iterdir())
  assert names == ['middle-cache', 'new-cache']
