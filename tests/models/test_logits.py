"""Losses of logits that are computed by blocks equal those of all at once."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import distill
from moe_jax.compression.distill_options import DistillOptions
from moe_jax.models.logits import Head, Logits
from moe_jax.training import losses, programs
from moe_jax.training.step import make_grad_fn
from tests.training import tiny

B, T, M, V = 4, 48, 8, 4099


def arrays(seed):
  """The arrays that logits are made of, drawn by a seed."""
  rng = np.random.default_rng(seed)
  shapes = (B, T, M), (M, V), (V,)
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def batch():
  rng = np.random.default_rng(9)
  weights = np.where(rng.random((B, T)) < 0.3, 0, rng.random((B, T)))
  targets = rng.integers(0, V, (B, T))
  return {
    'targets': jnp.asarray(targets, jnp.int32),
    'loss_weights': jnp.asarray(weights, jnp.float32),
  }


@functools.partial(jax.jit, static_argnames=('block_mb', 'soft'))
def loss_and_gradient(student, teacher, batch, block_mb, soft):
  """The summed loss and its gradient to the student; with a teacher if soft."""
  model = tiny.model_of(tiny.options())
  loss = model.loss

  def logits(x, kernel, bias):
    return Logits(x, Head(kernel, bias, 2.0, block_mb, (), ()))

  if soft:
    options = DistillOptions(
      teacher='run', hard_weight=0.5, soft_weight=2.0, temperature=3.0
    )
    loss = distill.mixed(model, options, lambda batch: (logits(*teacher), None))

  def total(student):
    result = loss(logits(*student), batch)
    sums = losses.loss_sums(result, batch, None)
    return sums.cross_entropy + 0.01 * sums.logits_z

  return jax.value_and_grad(total)(student)


@pytest.mark.parametrize('soft', [False, True])
def test_blocks_change_no_loss_and_no_gradient(soft):
  student, teacher, rows = arrays(0), arrays(1), batch()
  whole = loss_and_gradient(student, teacher, rows, 0, soft)
  blocks = loss_and_gradient(student, teacher, rows, 1, soft)
  assert_close(whole, blocks)
  compiled = loss_and_gradient.lower(student, teacher, rows, 1, soft).compile()
  # With a soft loss, blocks of both logits have a MiB together.
  assert widest(compiled, V) == B * T // (8 if soft else 4)


@functools.cache
def gradient_on(block_mb, **mesh):
  """The loss and the gradient of a tiny run's first step on a mesh."""
  options = tiny.options(
    batch_size=16,
    model=dict(
      attention=dict(num_heads=4),
      vocab_size=2 * V,
      embedding=dict(block_mb=block_mb),
      **tiny.router(balance_weight=0.5),
    ),
    logits_z_weight=0.1,
    mesh=dict(data=1) | mesh,
  )
  devices = jax.devices()[: math.prod(mesh.values())]
  model = options.build()
  made = programs.make_programs(options, model, options.mesh.make(devices))
  state = made.init_state()
  batch = made.put(jax.tree.map(np.asarray, tiny.batch(options)))
  grad_fn = make_grad_fn(model, losses.loss_weights(model, 0.1))
  arguments = batch, losses.normalizers(model, batch), jax.random.key(0)
  compiled = jax.jit(grad_fn).lower(state.params, *arguments).compile()
  (loss, _), grads = compiled(state.params, *arguments)
  return float(loss), jax.device_get(grads), compiled


@pytest.mark.as_users_compile
def test_devices_loop_over_their_own_rows():
  loss, grads, _ = gradient_on(0)
  # A block of a MiB has at most 31 tokens, or 127 if four devices share the
  # vocabulary, which they do not divide.
  for mesh, vocab_size, size in (
    ({}, 2 * V, 24),
    (dict(data=2, fsdp=2), 2 * V, 24),
    (dict(data=2, tensor=4), 2050, 96),
  ):
    other_loss, other_grads, compiled = gradient_on(1, **mesh)
    assert widest(compiled, vocab_size) == size
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert_close(other_grads, grads)


def widest(compiled, vocab_size):
  """The most tokens that an array of logits has in a program."""
  shapes = re.findall(rf'f32\[([\d,]+),{vocab_size}\]', compiled.as_text())
  return max(math.prod(map(int, s.split(','))) for s in shapes)


def assert_close(a, b):
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, a, b)
