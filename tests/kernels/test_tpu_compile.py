"""Programs compiled for TPUs that are only described: no TPU is needed.

All are compiled by one process, `python -m` of this module: the TPU's compiler
does not share a process with the tests' fake devices and flags. What it reports
is printed; `-s` shows it.
"""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from moe_jax.kernels import grouped_matmul
from moe_jax.partitioning import make_mesh
from moe_jax.training.programs import make_programs
from tests.training import tiny

pytest.importorskip('libtpu', reason='needs the extra tpu-compiler')
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TOPOLOGIES = ('v5e:2x2', 'v5p:2x2x1')
KERNEL = 'custom_call_target="tpu_custom_call"'


def described(topology: str) -> list[jax.Device]:
  """The devices of a TPU topology, which need not exist."""
  description = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  )
  return description.devices


def compile_product(topology, backend, dtype, N, E, M, F):
  """Compiles value and gradients of a grouped product with float32 kernels."""
  sharding = SingleDeviceSharding(described(topology)[0])
  abstract = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)

  def loss(x, w, group_sizes):
    y = grouped_matmul(x, w, group_sizes, backend)
    return jnp.square(y.astype(jnp.float32)).sum()

  x, group_sizes = abstract((N, M), dtype), abstract((E,), 'int32')
  kernels = abstract((E, M, F), 'float32')
  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  return gradient.lower(x, kernels, group_sizes).compile()


def compile_train_step(topology, mesh):
  """Compiles a step of a scanned bfloat16 decoder of 4 layers, two dropless."""
  dropless = {'dispatch': {'kind': 'dropless'}, 'capacity': {'kind': 'all'}}
  moe = {'num_selected': 2, **dropless}
  numerics = {'dtype': 'bfloat16'}
  options = tiny.options(
    model={'num_layers': 4, 'numerics': numerics, 'width': 64, 'moe': moe}
  ).filled(257)
  devices = described(topology)[: math.prod(mesh.values())]
  mesh = make_mesh(mesh, devices)
  programs = make_programs(options, options.build(), mesh)
  batch = jax.eval_shape(lambda: tiny.batch(options))
  return programs.train_step.lower(programs.abstract_state, batch).compile()


def report(program, **options):
  """The compiler's report on one program."""
  programs = {'product': compile_product, 'train_step': compile_train_step}
  compiled = programs[program](**options)
  text = compiled.as_text()
  return {
    'flops': compiled.cost_analysis()['flops'],
    'temporary_bytes': compiled.memory_analysis().temp_size_in_bytes,
    'kernels': text.count(KERNEL),
  }


def product(backend, dtype='bfloat16', topology=TOPOLOGIES[0], **sizes):
  """The request of a grouped product and its gradients."""
  options = dict(topology=topology, backend=backend, dtype=dtype)
  return {'program': 'product', **options, **sizes}


EVEN = {'N': 4096, 'M': 512, 'F': 1024}
REQUESTS = {
  # No size is a multiple of a tile.
  'megablox': product(
    'megablox', topology=TOPOLOGIES[1], N=1000, E=5, M=70, F=300
  ),
  'few experts': product('auto', 'float32', E=8, **EVEN),
  'many experts': product('auto', 'float32', E=64, **EVEN),
  'train step': {
    'program': 'train_step',
    'topology': TOPOLOGIES[0],
    'mesh': {'data': 2, 'expert': 2},
  },
}


@pytest.fixture(scope='module')
def reports():
  """The `report` on each request, made by a process of their own."""
  foreign = ('JAX_', 'XLA_', 'TPU_', 'LIBTPU_')
  env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
  # No TPU is opened, so that no lock is needed to share it.
  env |= {'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  command = [sys.executable, '-m', 'tests.kernels.test_tpu_compile']
  process = subprocess.run(
    command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
  )
  assert process.returncode == 0, process.stderr[-3000:]
  answers = json.loads(process.stdout.splitlines()[-1])
  for name, answer in answers.items():
    print(name, answer)
  return answers


def test_product_and_gradients(reports):
  counts = reports['megablox']
  assert counts['flops'] >= 3 * 2 * 1000 * 70 * 300
  # y, dx and dw have a kernel each; an interpreted program would have none.
  assert counts['kernels'] == 3


def test_more_experts_at_equal_rows_cost_nothing(reports):
  few, many = reports['few experts'], reports['many experts']
  # XLA uses the FLOPs that a kernel declares, and counts the program around it.
  assert many['flops'] < 1.05 * few['flops']
  assert many['temporary_bytes'] < 1.1 * few['temporary_bytes']


def test_train_step_of_a_scanned_decoder(reports):
  counts = reports['train step']
  assert counts['flops'] > 0
  # The body of the scan over layers has two products with two gradients each.
  assert counts['kernels'] == 6


if __name__ == '__main__':
  print(json.dumps({name: report(**r) for name, r in REQUESTS.items()}))
