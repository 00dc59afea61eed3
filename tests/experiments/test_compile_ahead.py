"""The report on steps of devices that need not exist; XLA flags that exist."""

import re
import types

import jax
import pytest

from experiments import compile_ahead
from moe_jax.analysis import roofline, sharded
from moe_jax.analysis.sharded import Collectives
from moe_jax.configs import base
from moe_jax.training.programs import make_programs
from tests import programs
from tests.training import tiny

NOTHING_SENT = Collectives({}, 0)


def options_of(batch_size=8, **mesh):
  return tiny.options(mesh=mesh, batch_size=batch_size).filled(257)


def report(num_devices, **mesh):
  options = options_of(**mesh)
  mesh = compile_ahead.mesh_of(options, jax.devices()[:num_devices])
  return compile_ahead.report(options, mesh)


@pytest.mark.slow
def test_the_report_is_of_one_device():
  step, alone = report(4, data=2, expert=2).step, report(1).step
  ours, whole = step.memory, alone.memory
  assert ours.temp_size_in_bytes < 0.6 * whole.temp_size_in_bytes
  assert ours.argument_size_in_bytes < whole.argument_size_in_bytes
  assert alone.collectives.by_kind == {}
  assert 'all-reduce' in step.collectives.by_kind
  # The state is donated: the only new arrays are the metrics.
  assert ours.alias_size_in_bytes > 0.9 * ours.argument_size_in_bytes
  needed_bytes = ours.argument_size_in_bytes + ours.temp_size_in_bytes
  assert step.needed_bytes == pytest.approx(needed_bytes, rel=0.1)


def test_the_largest_evaluation_decides_what_fits():
  wide = {'capacity': {'kind': 'all'}, 'dispatch': {'kind': 'einsum'}}
  evals = {'wide': base.evaluation(moe=wide)}
  moe = {'num_experts': 32, 'layers': 'all'}
  options = tiny.options(
    mesh={'data': 2}, evals=evals, model={'num_layers': 1, 'moe': moe}
  ).filled(257)
  mesh = compile_ahead.mesh_of(options, jax.devices()[:2])
  made = make_programs(options, options.build(), mesh)
  evaluation = compile_ahead.largest_evaluation(options, made)
  assert evaluation.name == 'wide'
  # The state stays beside the tokens, and the masks of all slots.
  state = sharded.device_bytes(made.abstract_state)
  assert evaluation.needed_bytes > state + 4 * 2 * 24 * 32 * 24
  memory = types.SimpleNamespace(
    argument_size_in_bytes=state,
    output_size_in_bytes=state,
    alias_size_in_bytes=state,
    temp_size_in_bytes=9,
    generated_code_size_in_bytes=0,
  )
  step = sharded.Sharded(0, 0, memory, NOTHING_SENT)
  report = compile_ahead.Report(step, evaluation, 1.0, 1)
  assert step.needed_bytes < report.needed_bytes == evaluation.needed_bytes


def test_a_verdict_names_the_device_and_both_numbers():
  (line,) = compile_ahead.verdicts('v5p:2x2x1', '', 10**10)
  assert line == 'fits TPU v5p: 10 GB of 95 GB (11%)'
  lines = compile_ahead.verdicts('v5p:2x2x1', 'v5e', 2 * 10**10)
  assert lines == {'DOES NOT FIT TPU v5e: 20 GB of 16 GB (125%)': False}
  # CPUs stand in for any device.
  lines = compile_ahead.verdicts('cpu:64', '', 10**10)
  assert len(lines) == len(roofline.DEVICES)


def test_flops_by_formula_are_split_over_devices():
  options = options_of(data=2, expert=2)
  one, four = (compile_ahead.formula_flops(options, n) for n in (1, 4))
  assert one == 4 * four
  twice = options_of(batch_size=16, data=2, expert=2)
  assert compile_ahead.formula_flops(twice, 4) == 2 * four


def test_a_batch_that_does_not_divide_fails_before_compiling():
  with pytest.raises(ValueError, match='batch_size=6'):
    compile_ahead.mesh_of(options_of(6, data=4), jax.devices()[:4])


# Beginnings of the names of the settings of these tests.
FOREIGN = ('JAX_PLATFORMS', 'XLA_', 'TPU_', 'LIBTPU_')


def run(*flags):
  words = '-m', 'experiments.compile_ahead', *flags
  return programs.run(*words, without=FOREIGN, timeout=580)


@pytest.mark.slow
def test_a_large_one_compiles_for_64_devices():
  process = run('--config=configs/glam_64b64e.py', '--topology=cpu:64')
  assert 'needed in all' in process.stdout, process.stderr[-3000:]
  assert 'TPU v5p' in process.stdout


def test_tpus_of_several_hosts_are_one_slice_unless_they_say_otherwise():
  pytest.importorskip('libtpu', reason='needs the extra tpu-compiler')
  program = """
from experiments.compile_ahead import described_devices
from moe_jax.partitioning import make_mesh
sizes = dict(data=-1, tensor=2)
for topology, slices, more in (
  ('v5e:4x4', 1, {}),
  ('v5p:4x4x2', 1, {}),
  ('v5p:2x2x2', 2, dict(dcn_data=2)),
):
  devices = described_devices(topology, slices)
  hosts = len({device.process_index for device in devices})
  print(hosts, make_mesh({**sizes, **more}, devices).shape['data'])
  if slices > 1:
    make_mesh(sizes, devices)
"""
  process = programs.run('-c', program, without=FOREIGN)
  assert process.stdout.splitlines() == ['4 8', '8 16', '4 8']
  assert '16 TPUs are in 2 slices' in process.stderr


@pytest.mark.slow
def test_a_described_tpu():
  pytest.importorskip('libtpu', reason='needs the extra tpu-compiler')
  process = run(
    *('--config=configs/tiny_switch.py:runlocal', '--topology=v5e:2x2'),
    *(
      '--config.batch_size=8',
      '--config.mesh.data=2',
      '--config.mesh.expert=2',
    ),
  )
  assert process.returncode == 0, process.stderr[-3000:]
  assert '4 x TPU v5 lite: data 2, fsdp 1, expert 2, tensor 1' in process.stdout
  assert 'fits TPU v5e' in process.stdout


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
  env = {'JAX_PLATFORMS': 'cpu', **env}
  process = programs.run('-c', code, env=env, without=FOREIGN)
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
