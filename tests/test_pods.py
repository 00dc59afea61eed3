"""XLA flags that experiments/pods.md names exist, by XLA's own parsers."""

import re

import pytest

from tests import programs

TEXT = (programs.ROOT / 'experiments' / 'pods.md').read_text(encoding='utf-8')
TOPOLOGY = (
  'from jax.experimental import topologies;'
  "topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1')"
)


def flags(kind):
  """Flags in the tables of pods.md, such as '--xla_gpu_...=value'."""
  all_flags = re.findall(r'`(--xla_\w+=[\w]+)`', TEXT)
  gpu = [flag for flag in all_flags if flag.startswith('--xla_gpu_')]
  return gpu if kind == 'gpu' else [f for f in all_flags if f not in gpu]


def errors_of(code, **env):
  """The errors of a process with these flags, '' if there are none."""
  foreign = ('JAX_', 'XLA_', 'TPU_', 'LIBTPU_')
  env = {'JAX_PLATFORMS': 'cpu', **env}
  process = programs.run('-c', code, env=env, without=foreign)
  return process.stderr[-2000:] if process.returncode else ''


def test_flags_for_gpus_exist():
  gpu_flags = flags('gpu')
  assert len(gpu_flags) >= 5
  code = 'import jax; jax.devices()'
  assert not errors_of(code, XLA_FLAGS=' '.join(gpu_flags))
  assert 'xla_gpu_none' in errors_of(code, XLA_FLAGS='--xla_gpu_none=true')


@pytest.mark.slow
def test_flags_for_tpus_exist():
  pytest.importorskip('libtpu', reason='needs the extra tpu-compiler')
  tpu_flags = [f for f in flags('tpu') if 'xla_dump_to' not in f]
  assert len(tpu_flags) >= 5
  env = {'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_SKIP_MDS_QUERY': '1'}
  assert not errors_of(TOPOLOGY, LIBTPU_INIT_ARGS=' '.join(tpu_flags), **env)
  errors = errors_of(TOPOLOGY, LIBTPU_INIT_ARGS='--xla_tpu_none=true', **env)
  assert 'xla_tpu_none' in errors
