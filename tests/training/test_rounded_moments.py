"""Moments in bfloat16 are right on average, and the same in every run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.training import rounded_moments
from moe_jax.training.optimizer import AdamW
from moe_jax.training.schedules import Constant
from tests.training.test_optimizer import AXES, random_tree

HALVES = AdamW(
  schedule=Constant(warmup_steps=0),
  learning_rate=1e-3,
  b2=0.999,
  moment_dtype='bfloat16',
)


rounded_of = jax.jit(rounded_moments.rounded)


@functools.partial(jax.jit, static_argnums=(0, 2))
def noise(name, count, shape):
  return rounded_moments.noise(name, jnp.int32(count), shape)


def test_a_number_is_rounded_to_a_neighbour_and_on_average_to_itself():
  # Beside 1.0 bfloat16 has steps of 2^-7; a quarter of one is rounded up in a
  # quarter of the cases.
  x = jnp.full((50, 400), -(1 + 2.0**-9), jnp.float32)
  rounded = np.asarray(rounded_of(x, noise('w', 3, x.shape)), np.float32)
  assert {-1.0, -(1 + 2.0**-7)} == set(np.unique(rounded).tolist())
  up = (rounded != -1).mean()
  assert abs(up - 0.25) < 5 * (0.25 * 0.75 / x.size) ** 0.5
  # Each row and each column has this share, too: neighbours are independent.
  for axis in (0, 1):
    shares = (rounded != -1).mean(axis)
    assert shares.std() < 1.4 * (0.25 * 0.75 / x.shape[axis]) ** 0.5


def test_what_bfloat16_has_is_kept_and_so_is_what_is_not_finite():
  x = np.array([0.0, -2.5, 1e-30, np.inf, -np.inf, np.nan], np.float32)
  x[2] = np.asarray(jnp.bfloat16(x[2]), np.float32)
  x = np.append(x, np.array([0x7FFFFFFF], np.uint32).view(np.float32))
  most = jnp.full(x.shape, 0xFFFF, jnp.uint32)
  rounded = np.asarray(rounded_of(jnp.asarray(x), most), np.float32)
  np.testing.assert_array_equal(np.asarray(rounded, np.float32), x)


def test_noise_differs_between_steps_names_and_elements():
  first = np.asarray(noise('a', 1, (30, 40)))
  for other in (noise('a', 2, (30, 40)), noise('b', 1, (30, 40))):
    assert (first == other).mean() < 0.01
  assert len(np.unique(first)) == first.size
  np.testing.assert_array_equal(first, noise('a', 1, (30, 40)))


def test_a_small_change_moves_the_second_moment_on_average():
  """A change of a thousandth would be lost in rounding to the nearest."""
  params = random_tree(0)
  grads = jax.tree.map(np.ones_like, params)
  adam = HALVES.preconditioner(AXES, None)
  state = adam.init(params)
  # The moments are two arrays, as both may be donated.
  assert state.mu['w'] is not state.nu['w']
  # The second moment has its value after many steps with gradients of 0.9; now
  # gradients are 1.
  state = state._replace(nu=optax.tree.full_like(state.nu, 0.8125))
  update = jax.jit(adam.update)
  for _ in range(100):
    _, state = update(grads, state)
  nu = np.asarray(state.nu['layers']['experts'], np.float32)
  expected = 1 - 0.1875 * 0.999**100
  assert abs(nu.mean() - expected) < 5e-3
  assert jnp.bfloat16(0.999 * 0.8125 + 0.001) == jnp.bfloat16(0.8125)
  assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype('bfloat16')}
