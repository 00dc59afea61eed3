"""Muon against its published iteration, matrix by matrix, and in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import models
from moe_jax.layers.parameters import Role
from moe_jax.models.trees import flatten
from moe_jax.partitioning import make_mesh
from moe_jax.training import programs
from moe_jax.training.optimizer import Muon, dimensions, is_hidden
from moe_jax.training.schedules import Constant
from tests.training import tiny

AXES = {
  'w_in': ('embed', 'mlp'),
  'experts': ('layers', 'expert', 'embed', 'mlp'),
  'w_query': ('layers', 'embed', 'heads', 'kv'),
  'w_out': ('heads', 'kv', 'embed'),
  'embedding': ('vocab', 'embed'),
  'scale': ('embed',),
}
ROLES = {
  'w_in': Role('ffn', 'kernel'),
  'experts': Role('expert', 'kernel'),
  'w_query': Role('attention', 'kernel'),
  'w_out': Role('attention', 'kernel'),
  'embedding': Role('embedding', 'table'),
  'scale': Role('norm', 'scale'),
}
SHAPES = {
  'w_in': (6, 5),
  'experts': (2, 3, 4, 7),
  'w_query': (2, 6, 2, 4),
  'w_out': (2, 4, 6),
  'embedding': (9, 6),
  'scale': (6,),
}
# The kernels as stacks of matrices [inputs, outputs].
FLAT = {
  'w_in': (1, 6, 5),
  'experts': (6, 4, 7),
  'w_query': (2, 6, 8),
  'w_out': (1, 8, 6),
}
PLAIN = dict(schedule=Constant(warmup_steps=0), clip_norm=0.0, weight_decay=0.0)


def arrays(seed):
  rng = np.random.default_rng(seed)
  # Experts have very different gradients, so that a shared norm would show.
  size = {'experts': 10.0 ** np.arange(3).reshape(1, 3, 1, 1)}
  return {
    name: jnp.asarray(size.get(name, 1) * rng.normal(size=shape), jnp.float32)
    for name, shape in SHAPES.items()
  }


def orthogonal(matrix, steps, epsilon=1e-8):
  """The published quintic iteration, in float64."""
  x = matrix / (np.linalg.norm(matrix) + epsilon)
  wide = x.shape[0] <= x.shape[1]
  x = x if wide else x.T
  for _ in range(steps):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x if wide else x.T


def expected(grads, momentum, rms, steps):
  """Updates of kernels after two equal gradients, by name."""
  updates = {}
  for name, (_, inputs, outputs) in FLAT.items():
    g = np.asarray(grads[name], np.float64).reshape(FLAT[name])
    mean = g * (1 - momentum**2)  # after two steps
    # Nesterov's look ahead, each of its parts without the bias of zeros.
    ahead = momentum * mean / (1 - momentum**3)
    ahead += (1 - momentum) * g / (1 - momentum**2)
    scale = (
      rms * np.sqrt(max(inputs, outputs))
      if rms
      else np.sqrt(max(1, outputs / inputs))
    )
    matrices = [scale * orthogonal(m, steps) for m in ahead]
    updates[name] = np.stack(matrices).reshape(SHAPES[name])
  return updates


@pytest.mark.parametrize('rms', [0.0, 0.2])
def test_each_matrix_by_the_published_iteration(rms):
  o = Muon(learning_rate=1.0, momentum=0.9, rms=rms, adam_rate=0.5, **PLAIN)
  optimizer = o.transformation(10, AXES, ROLES)
  update = jax.jit(optimizer.update)
  params, grads = arrays(0), arrays(1)
  # Kernels have equal gradients twice; those that Adam trains change.
  adam_grads = {name: grads[name] for name in SHAPES if name not in FLAT}
  adam = optax.scale_by_adam(o.b1, o.b2, o.epsilon)
  state, own_state = optimizer.init(params), adam.init(adam_grads)
  for size in (1.0, -0.3):
    scaled_grads = jax.tree.map(lambda g: size * g, adam_grads)  # noqa: B023
    updates, state = update({**grads, **scaled_grads}, state, params)
    by_adam, own_state = jax.jit(adam.update)(scaled_grads, own_state)
  for name, reference in expected(grads, 0.9, rms, 5).items():
    np.testing.assert_allclose(-updates[name], reference, rtol=0, atol=2e-3)
  for name in adam_grads:
    np.testing.assert_allclose(-updates[name], 0.5 * by_adam[name], rtol=1e-5)


def trained_by_adam(run_programs):
  """The path and the role of each parameter that trains and is not Muon's."""
  adapters, names = run_programs.adapters, run_programs.trained.names
  axes, roles = flatten(adapters.matrix_axes), flatten(adapters.trees.roles)
  return [
    (path, role)
    for path, role in roles.items()
    if '/'.join(path) in names and not is_hidden(role, axes[path])
  ]


def test_factors_of_adapters_are_matrices_too():
  options = tiny.options(
    model=dict(moe=dict(shared_expert=dict(hidden=24, gated=True))),
    lora=dict(rank=3, parts='attention + experts + shared_experts'),
    optimizer=dict(kind='muon', clip_norm=0.0),
  )
  mesh = make_mesh(dict(data=1), jax.devices()[:1])
  run_programs = programs.make_programs(options, tiny.model_of(options), mesh)
  # The gate of the shared expert has one output, so B has as many numbers as
  # its rank.
  ((path, role),) = trained_by_adam(run_programs)
  assert role == Role('shared_expert', 'kernel')
  assert flatten(run_programs.adapters.trees.shapes)[path].size == 3
  assert dimensions(('heads', 'kv', 'rank')) == ((0, 1), (2,))
  assert dimensions(('rank', 'heads', 'kv')) == ((0,), (1, 2))


LATENT = dict(
  attention=dict(kind='latent', num_heads=2, query_rank=24, kv_rank=24)
  | dict(plain_width=12, rotary_width=12, value_width=24),
  moe=dict(shared_expert=dict(hidden=24, gated=True)),
)


@pytest.mark.slow
def test_every_matrix_of_a_model():
  """Every kernel's update has the size that one alone has, however stacked."""
  options = tiny.options(
    model=LATENT, optimizer=dict(kind='muon', iterations=12, clip_norm=0.0)
  )
  model = tiny.model_of(options)
  mesh = make_mesh(dict(data=1), jax.devices()[:1])
  run_programs = programs.make_programs(options, model, mesh)
  trees = models.describe(model)
  rng = np.random.default_rng(0)
  grads = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), trees.shapes
  )

  @jax.jit
  def first_updates(grads):
    params = jax.tree.map(jnp.zeros_like, grads)
    return run_programs.optimizer.update(
      grads, run_programs.optimizer.init(params), params
    )[0]

  rate = float(options.optimizer.rate(options.total_steps)(0))
  sizes = [
    np.sqrt(np.mean(np.square(update))) / rate
    for update, role in zip(
      jax.tree.leaves(jax.device_get(first_updates(grads))),
      jax.tree.leaves(trees.roles, is_leaf=lambda x: isinstance(x, Role)),
      strict=True,
    )
    if role.form == 'kernel'
    and update.shape[-1] > 1
    and role.role in ('attention', 'expert', 'ffn', 'shared_expert')
  ]
  assert len(sizes) >= 6
  np.testing.assert_allclose(sizes, 0.2, rtol=0.35)
  by_adam = {role for _, role in trained_by_adam(run_programs)}
  assert {Role('router', 'kernel'), Role('embedding', 'table')} <= by_adam
  assert Role('attention', 'kernel') not in by_adam
