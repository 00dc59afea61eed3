"""The loss of soft labels, on examples by hand and against its definition."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import distill

B, T, V = 3, 5, 7
compiled = functools.partial(jax.jit, static_argnames='temperature')
soft_of = compiled(distill.soft_cross_entropy)


def logits(seed):
  rng = np.random.default_rng(seed)
  return jnp.asarray(2 * rng.normal(size=(B, T, V)), jnp.float32)


def test_a_told_example():
  # The teacher prefers the first of two words 3 to 1, the student 1 to 1: both
  # cost the student log 2. With three hard parts of four and the first word as
  # the target, all of the loss is log 2.
  student = jnp.array([[[0.0, 0.0]]])
  teacher = jnp.array([[[math.log(3.0), 0.0]]])
  np.testing.assert_allclose(soft_of(student, teacher), math.log(2), rtol=1e-6)
  # The student swaps them: 3/4 of log 4, and 1/4 of log 4/3.
  swapped = teacher[..., ::-1]
  expected = 0.75 * math.log(4) + 0.25 * math.log(4 / 3)
  np.testing.assert_allclose(soft_of(swapped, teacher), expected, rtol=1e-6)
  # At T = 2 the ratio of 3 is its root, and the loss has the factor 4.
  ratio = math.sqrt(3)
  p, q = ratio / (1 + ratio), 1 / (1 + ratio)
  expected = -4 * (p * math.log(q) + q * math.log(p))
  np.testing.assert_allclose(
    soft_of(swapped, teacher, 2.0), expected, rtol=1e-6
  )


def test_a_student_that_is_its_teacher_has_no_gradient():
  def loss(student, temperature):
    teacher = logits(0)
    return soft_of(student, teacher, temperature).sum()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  for temperature in (1.0, 3.0):
    assert np.abs(gradient(logits(0), temperature)).max() < 1e-6
    assert np.abs(gradient(logits(1), temperature)).max() > 0.1


def test_a_part_of_the_logits_sums_to_one():
  # The first two of the probabilities 1/2, 1/3, 1/6 become 3/5 and 2/5.
  teacher = jnp.log(jnp.array([[0.5, 1 / 3]]))
  student = jnp.log(jnp.array([[0.2, 0.3, 0.5]]))
  ids = jnp.array([[2, 0]])
  expected = -(0.6 * math.log(0.5) + 0.4 * math.log(0.2))
  np.testing.assert_allclose(
    soft_of(student, teacher, 1.0, ids), expected, rtol=1e-6
  )
