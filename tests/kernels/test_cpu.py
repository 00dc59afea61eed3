"""Code for XLA's CPU compiler alone changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from moe_jax.kernels import cpu


def test_most_are_chosen():
  # Two tokens leave on average 0.75^2 of Mixtral's 8 experts unused, three
  # leave 0.75^3.
  assert not cpu.most_are_chosen(2, 2, 8)
  assert cpu.most_are_chosen(3, 2, 8)
  assert not cpu.most_are_chosen(16, 1, 128)


def test_gelu_is_the_exact_one():
  x = np.linspace(-4, 4, 33, dtype=np.float32)
  expected = x / 2 * (1 + erf(x / np.sqrt(2)))
  np.testing.assert_allclose(
    cpu.gelu(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-6
  )


def test_the_gradient_of_what_is_added_to_each_is_that_of_a_sum():
  rng = np.random.default_rng(0)
  scores, bias, weights = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((3, 2, 5, 7), (2, 5, 7), (3, 2, 5, 7))
  )

  def loss(add):
    return lambda scores, bias: (jnp.tanh(add(scores, bias)) * weights).sum()

  gradients = jax.grad(loss(cpu.add_to_each), (0, 1))(scores, bias)
  expected = jax.grad(loss(lambda s, b: s + b[None]), (0, 1))(scores, bias)
  for leaf, expected_leaf in zip(gradients, expected):
    np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-5, atol=1e-6)
