"""Attention compiled for a TPU that is only described."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
T = 256

# This program compiles the training gradient of two layers and prints what the
# compiled programs contain.
PROGRAM = f"""
import json, re
import jax, jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from moe_jax import models
from moe_jax.layers.shared import Numerics
from moe_jax.partitioning import make_mesh
from tests.models import tiny

B, T = 4, {T}
described = topologies.get_topology_desc(
  platform='tpu', topology_name='v5e:2x2'
).devices


def contents(attention, sizes, devices):
  mesh = make_mesh(sizes, devices)
  model = tiny.build(
    dict(num_experts=0),
    attention=dict(implementation=attention, num_kv_heads=2),
    numerics=Numerics('bfloat16'),
  )

  def place(leaf, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  params = jax.tree.map(place, nn.meta.unbox(models.abstract_params(model)))
  ids = place(jax.ShapeDtypeStruct((B, T), jnp.int32), ('data', 'fsdp'))

  def loss(params, tokens, segment_ids):
    logits, _ = model.apply({{'params': params}}, tokens, segment_ids)
    return jax.nn.logsumexp(logits, axis=-1).mean()

  text = jax.jit(jax.grad(loss)).lower(params, ids, ids).compile().as_text()
  kernels = re.findall(r'splash_mha_(fwd|dq|dkv)_segmented', text)
  squares = re.findall(rf'\\[[0-9,]*{{T}},{{T}}\\]', text)
  return sorted(set(kernels)), sorted(set(squares))


print(json.dumps(dict(
  einsum=contents('einsum', dict(), described[:1]),
  auto=contents('auto', dict(fsdp=2, tensor=2), described),
)))
"""


@pytest.mark.slow
def test_auto_compiles_to_the_kernel_and_keeps_no_square_array():
  pytest.importorskip('libtpu', reason='needs the extra tpu-compiler')
  prefixes = ('JAX_', 'TPU_', 'XLA_')
  env = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
  env |= dict(
    # No device is opened, so that no lock is needed.
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    JAX_PLATFORMS='cpu',
    TPU_ACCELERATOR_TYPE='v5litepod-4',
    TPU_SKIP_MDS_QUERY='1',
    TPU_WORKER_HOSTNAMES='localhost',
  )
  run = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert run.returncode == 0, run.stderr
  contents = json.loads(run.stdout.splitlines()[-1])
  assert contents['auto'] == [['dkv', 'dq', 'fwd'], []]
  kernels, squares = contents['einsum']
  assert not kernels and squares
