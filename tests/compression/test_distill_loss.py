"""The loss of soft labels, on examples by hand and against its definition."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import distill
from moe_jax.compression.distill_options import DistillOptions
from tests.training import tiny

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


def test_nothing_is_differentiated_in_the_teacher():
  def loss(teacher):
    return soft_of(logits(1), teacher).sum()

  assert not np.any(jax.jit(jax.grad(loss))(logits(0)))


@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_all_kept_logits_are_the_whole_loss(temperature):
  student, teacher = logits(0), logits(1)
  values, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), V)
  whole_loss = soft_of(student, teacher, temperature)
  kept_loss = soft_of(student, values, temperature, ids)
  np.testing.assert_allclose(kept_loss, whole_loss, rtol=1e-5)


def test_a_part_of_the_logits_sums_to_one():
  # The first two of the probabilities 1/2, 1/3, 1/6 become 3/5 and 2/5.
  teacher = jnp.log(jnp.array([[0.5, 1 / 3]]))
  student = jnp.log(jnp.array([[0.2, 0.3, 0.5]]))
  ids = jnp.array([[2, 0]])
  expected = -(0.6 * math.log(0.5) + 0.4 * math.log(0.2))
  np.testing.assert_allclose(
    soft_of(student, teacher, 1.0, ids), expected, rtol=1e-6
  )


def test_both_parts_are_weighted_and_soft_labels_alone_are_left():
  model = tiny.model_of(tiny.options())
  batch = tiny.rows(B, T, vocab_size=V)
  student, teacher = logits(0), logits(1)

  def loss(hard, soft):
    loss_fn = distill.mixed(
      model,
      DistillOptions('runs/teacher', hard_weight=hard, soft_weight=soft),
      lambda outputs, batch: soft_of(outputs, teacher),
    )
    return loss_fn(student, batch)

  hard_loss = model.loss(student, batch)
  is_real = np.asarray(batch['loss_weights']) != 0
  assert is_real.any()
  assert not is_real.all()
  soft = soft_of(student, teacher)
  np.testing.assert_allclose(
    loss(0.0, 1.0).nats[is_real], soft[is_real], rtol=1e-6
  )
  mixed_loss = loss(0.75, 0.25)
  np.testing.assert_allclose(
    mixed_loss.nats[is_real],
    (0.75 * hard_loss.nats + 0.25 * soft)[is_real],
    rtol=1e-6,
  )
  np.testing.assert_array_equal(mixed_loss.logits_z, hard_loss.logits_z)
