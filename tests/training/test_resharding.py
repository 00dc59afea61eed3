"""A state saved on one mesh is restored equal on another."""

import functools

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
MESHES = [(8, 1, 1, 1), (1, 1, 4, 2), (1, 1, 1, 1)]


@functools.cache
def programs(shape):
  """The programs of a run on a mesh of the given shape."""
  sizes = dict(zip(partitioning.MESH_AXES, shape))
  options = tiny.options(batch_size=8, model=MODEL, mesh=sizes)
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


def restored(folder, target):
  with Checkpointer(folder) as checkpoints:
    state = checkpoints.restore(target.abstract_state).state
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  assert shardings == jax.tree.map(lambda x: x.sharding, target.abstract_state)
  return state


def save(folder, state):
  with Checkpointer(folder) as checkpoints:
    checkpoints.save(1, state)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_every_array_and_expert_on_every_mesh(tmp_path):
  state = trained()
  (bias,) = jax.tree.leaves(state.router_state)
  assert bias.size == E
  save(tmp_path / 'mesh', state)
  for shape in MESHES:
    state = restored(tmp_path / 'mesh', programs(shape))
    assert_equal(state, trained())
    kernel = state.params['layers']['layer_1']['moe']['experts']['w_in']
    _, fsdp, expert, tensor = shape
    shard = kernel.sharding.shard_shape(kernel.shape)
    assert shard == (1, E // expert, 16 // fsdp, 24 // tensor)
  save(tmp_path / 'one', state)  # from one device to the mesh again
  assert_equal(restored(tmp_path / 'one', programs(SOURCE)), trained())
