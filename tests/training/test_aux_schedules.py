"""Schedules of auxiliary losses, by hand and in the step of a tiny model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import empty_aux
from moe_jax.training import losses, programs, setup
from moe_jax.training.losses import Constant, Linear
from tests.training import tiny

# One layer with losses 2 (balance) and 8 (z) over 4 tokens: means 0.5 and 2.
WHOLE = losses.Normalizers(jnp.float32(1), jnp.array([4.0]))
WEIGHTS = losses.LossWeights(
  {'balance_loss': 0.1, 'z_loss': 0.01, 'my_loss': 0}
)
LINE = Linear(factor=1.0, final_factor=0.2, start_step=2, line_steps=4)
HEAVY = tiny.router(balance_weight=0.5, z_weight=0.3)


def total(schedule, step, weights=WEIGHTS):
  aux = jax.tree.map(lambda leaf: leaf[None], empty_aux(4, 1))
  layer_losses = {'balance_loss': jnp.array([2.0]), 'z_loss': jnp.array([8.0])}
  aux = aux._replace(losses=layer_losses)
  step = jnp.asarray(step, jnp.int32)
  return losses.aux_loss(aux, WHOLE, schedule.weights(weights, step))


@pytest.mark.parametrize(
  ('schedule', 'factors'),
  [
    (Constant(), [1, 1, 1, 1, 1, 1, 1, 1]),
    (Constant(factor=3.0), [3, 3, 3, 3, 3, 3, 3, 3]),
    (LINE, [1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
    # A warm-up of the losses, and one that never changes.
    (
      Linear(factor=0.0, final_factor=1.0, line_steps=2),
      [0, 0.5, 1, 1, 1, 1, 1, 1],
    ),
    (Linear(factor=0.7, final_factor=0.7), [0.7] * 8),
    (Linear(factor=0.5, start_step=2, line_steps=1), [0.5] * 3 + [0] * 5),
  ],
)
def test_the_factor_of_each_step(schedule, factors):
  by_step = [total(schedule, step) for step in range(8)]
  expected = [factor * (0.1 * 0.5 + 0.01 * 2) for factor in factors]
  np.testing.assert_allclose(by_step, expected, rtol=1e-6)


def test_only_the_named_losses_change():
  schedule = Linear(losses=('z',), line_steps=1)
  np.testing.assert_allclose(total(schedule, 0), 0.05 + 0.02, rtol=1e-6)
  np.testing.assert_allclose(total(schedule, 1), 0.05, rtol=1e-6)
  off = Constant(losses=('logits_z',), factor=0.0)
  weights = losses.LossWeights({'balance_loss': 0.1}, logits_z=0.4)
  assert off.weights(weights, 0) == losses.LossWeights({'balance_loss': 0.1})


def test_a_factor_of_zero_leaves_the_losses_out():
  for schedule in (Constant(factor=0.0), Linear(factor=0.0)):
    weights = schedule.weights(WEIGHTS, jnp.int32(5))
    assert list(weights.routers.values()) == [0.0, 0.0, 0.0]
  # A loss without weight stays a constant 0 under a factor that changes.
  weights = LINE.weights(WEIGHTS, jnp.int32(5))
  assert weights.routers['my_loss'] == 0.0


@functools.cache
def step_losses(microbatches=1, devices=1, **aux):
  """The total losses of three steps of a tiny run."""
  mesh = dict(data=1, fsdp=2, expert=2) if devices > 1 else {}
  options = tiny.options(
    batch_size=8,
    microbatches=microbatches,
    model=dict(vocab_size=264, **HEAVY),
    aux_losses=aux,
    mesh=mesh,
  )
  devices = jax.devices()[:devices]
  mesh = options.mesh.make(devices)
  run_programs = programs.make_programs(options, options.build(), mesh)
  state, by_step = run_programs.init_state(), []
  batch = run_programs.put(jax.tree.map(np.asarray, tiny.batch(options)))
  for _ in range(3):
    state, metrics = run_programs.train_step(state, batch)
    by_step.append(float(metrics.loss))
  return by_step


AUX = dict(kind='linear', factor=0.0, final_factor=2.0, line_steps=2)


@pytest.mark.as_users_compile
@pytest.mark.slow
def test_a_step_has_the_factor_of_its_number_on_any_mesh():
  scheduled = step_losses(**AUX)
  # The first step has no auxiliary loss, the second the given weights.
  first = step_losses(factor=0.0)[0]
  np.testing.assert_allclose(scheduled[0], first, rtol=1e-6)
  assert scheduled[1] > first + 0.5
  split = step_losses(microbatches=2, devices=4, **AUX)
  np.testing.assert_allclose(split, scheduled, rtol=1e-5)


def test_a_loss_that_no_router_has_is_refused_by_name(tmp_path):
  def set_up(*names):
    options = tiny.options(aux_losses={'losses': names})
    setup.set_up(options, tmp_path, devices=jax.devices()[:1])

  set_up('balance', 'load')
  set_up('load', 'logits_z')
  with pytest.raises(ValueError, match=r"loss in aux_losses\.losses 'zz'"):
    set_up('balance', 'zz')
