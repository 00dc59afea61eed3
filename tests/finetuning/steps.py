"""Programs of small runs, which train for a few steps on one batch."""

import jax
import numpy as np

from moe_jax import partitioning
from moe_jax.training.programs import make_programs
from tests.training import tiny

V = 264
MESH = dict(zip(partitioning.MESH_AXES, (1, 2, 2, 2)))


def arrays(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {partitioning.path_name(path): np.array(x) for path, x in leaves}


def programs_of(devices=1, **overrides):
  """The options of a run on one device or eight, and its programs."""
  mesh = dict(mesh=MESH) if devices == 8 else {}
  options = tiny.options(batch_size=8, **overrides, **mesh)
  mesh = options.mesh.make(jax.devices()[:devices])
  return options, make_programs(options, options.build(), mesh)


def batch_of(options, programs):
  rows = tiny.batch(options, vocab_size=V)
  return programs.put(jax.tree.map(np.asarray, rows))


def train(options, programs, num_steps):
  """Parameters before and after the steps, and the state after them."""
  state, batch = tiny.first_state(programs), batch_of(options, programs)
  before = arrays(state.params)
  for _ in range(num_steps):
    state, _ = programs.train_step(state, batch)
  return before, arrays(state.params), state
