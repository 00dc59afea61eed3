"""A state saved on one mesh is restored equal on another."""

import functools
import hashlib

import jax
import numpy as np
import pytest

from moe_jax import partitioning
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.training.programs import make_programs
from tests.training import tiny

E, V = 8, 257  # no axis divides the tokens
MODEL = {
  'vocab_size': V,
  'ffn': {'hidden': 24},
  'moe': {
    'num_experts': E,
    'num_selected': 2,
    **tiny.router(
      gates='renormalized',
      balance_bias_rate=0.01,
      balance_bias_scores='softmax',
    )['moe'],
  },
}
SOURCE = (1, 2, 2, 2)  # data, fsdp, expert, tensor
MESHES = [(8, 1, 1, 1), (1, 1, 4, 2), (2, 2, 2, 1), (1, 1, 1, 1)]


@functools.cache
def programs(shape, **sharding):
  """The programs of a run on a mesh of the given shape."""
  sizes = dict(zip(partitioning.MESH_AXES, shape))
  options = tiny.options(
    batch_size=8, model=MODEL, mesh=sizes, sharding=sharding
  )
  mesh = options.mesh.make(jax.devices()[: np.prod(shape)])
  return make_programs(options, options.build(), mesh)


@functools.cache
def trained():
  """A state on `SOURCE` as after training: all of its arrays differ."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    value = 0.2 * rng.standard_normal(leaf.shape) + 0.5 * (leaf.ndim < 3)
    if leaf.ndim == 0:
      value = 7
    return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

  return jax.tree.map(draw, programs(SOURCE).abstract_state)


def checksum(array):
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def checksums(state):
  """Checksums of every array, and of each expert where an array has them."""
  sums = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name, array = partitioning.path_name(path), np.asarray(leaf)
    sums[name] = checksum(array)
    if '/experts/' in name:
      assert array.shape[1] == E, name
      for e in range(E):
        sums[f'{name}, expert {e}'] = checksum(array[:, e])
  return sums


def restored(folder, target):
  with Checkpointer(folder) as checkpoints:
    state = checkpoints.restore(target.abstract_state).state
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  assert shardings == jax.tree.map(lambda x: x.sharding, target.abstract_state)
  return state


def save(folder, state):
  with Checkpointer(folder) as checkpoints:
    checkpoints.save(1, state)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('checkpoints')
  save(folder, trained())
  return folder


def expert_kernel(state):
  return state.params['layers']['layer_1']['moe']['experts']['w_in']


@pytest.mark.slow
def test_every_array_and_expert_on_every_mesh(folder, tmp_path):
  saved = checksums(trained())
  assert any(name.startswith('router_state/') for name in saved)
  experts = [name for name in saved if name.endswith('expert 7')]
  assert len(experts) == 6  # two kernels with two moments each
  assert len({saved[name] for name in saved if 'w_in, expert' in name}) == 3 * E
  for shape in MESHES:
    state = restored(folder, programs(shape))
    assert checksums(state) == saved, shape
    (shard, *_) = expert_kernel(state).addressable_shards
    _, fsdp, expert, tensor = shape
    assert shard.data.shape == (1, E // expert, 16 // fsdp, 24 // tensor)
  save(tmp_path, state)  # from one device to the mesh again
  assert checksums(restored(tmp_path, programs(SOURCE))) == saved


def test_experts_over_two_mesh_axes():
  target = programs((1, 1, 4, 2), expert='expert,tensor', expert_mlp='')
  kernel = expert_kernel(target.abstract_state)
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 1, 16, 24)
