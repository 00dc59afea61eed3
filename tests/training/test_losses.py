"""Normalisers, weights and schedules of losses, by hand and in a tiny step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.base import TokenLosses
from moe_jax.routing import empty_aux
from moe_jax.training import losses, programs, setup
from moe_jax.training.losses import Constant, Linear
from tests.training import tiny

ENCODER_DECODER = tiny.options(
  data={'source': {'kind': 'python_stdlib_docstrings'},
        'task': {'kind': 'seq2seq'}, 'target_len': 3},
  model={'kind': 'encoder_decoder'},
)  # fmt: skip


def batch():
  """Decoder rows of 3 and 1 real tokens, encoder rows of 4 and 3."""
  return {
    'segment_ids': jnp.array([[1, 1, 1], [1, 0, 0]]),
    'encoder_segment_ids': jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    'targets': jnp.array([[0, 1, 2], [2, 0, 0]]),
    'loss_weights': jnp.array([[1.0, 0, 1], [1, 0, 0]]),
  }


def aux(z_losses, **others):
  """The sums of layers with these losses."""
  empty = jax.tree.map(
    lambda leaf: jnp.stack([leaf] * len(z_losses)), empty_aux(4, 1)
  )
  by_name = {'z_loss': z_losses, **others}
  return empty._replace(losses={k: jnp.array(v) for k, v in by_name.items()})


def test_each_stack_is_divided_by_its_own_tokens():
  model = tiny.model_of(ENCODER_DECODER)
  totals = losses.normalizers(model, batch())
  assert totals.weight == 3
  # The encoder's layers come first.
  assert totals.tokens.tolist() == [7, 7, 4, 4]
  # Z-losses are 14 and 0 over 7 tokens, and 8 and 0 over 4: means are 2 and 2.
  weights = losses.LossWeights({'z_loss': 0.5})
  total = losses.aux_loss(aux([14.0, 0.0, 8.0, 0.0]), totals, weights)
  np.testing.assert_allclose(total, 0.5 * (2 + 0 + 2 + 0), rtol=1e-6)
  # A mean over layers has that over their number.
  moe = {'layers': 'all', 'layer_reduce': 'mean'}
  model = tiny.model_of(tiny.options(model={'moe': moe, 'num_layers': 3}))
  averaged = losses.loss_weights(model)
  assert averaged.num_averaged == 3
  weights = losses.LossWeights({'z_loss': 0.5}, num_averaged=4)
  mean = losses.aux_loss(aux([14.0, 0.0, 8.0, 0.0]), totals, weights)
  np.testing.assert_allclose(mean, total / 4, rtol=1e-6)


def test_the_logits_z_loss_is_weighted_like_the_cross_entropy():
  first = [[1.0, 1, 2], [9, 9, 9], [3, 1, 0.5]]
  second = [[1.0, 2, 4], [1, 1, 1], [1, 1, 1]]
  logits = jnp.log(jnp.array([first, second]))
  rows, model = batch(), tiny.model_of(tiny.options())
  sums = losses.loss_sums(model.loss(logits, rows), rows, aux([0.0, 0.0]))
  z = np.log([4, 4.5, 7.0])
  nats = -np.log([1 / 4, 0.5 / 4.5, 4 / 7])
  np.testing.assert_allclose(sums.logits_z, (z**2).sum(), rtol=1e-5)
  totals = losses.normalizers(model, rows)
  weights = losses.LossWeights(logits_z=0.1)
  expected = nats.mean() + 0.1 * (z**2).mean()
  total = losses.total_loss(sums, totals, weights)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  # As a microbatch the rows are divided by the weights of the whole batch.
  of_more = losses.total_loss(sums, totals._replace(weight=12.0), weights)
  np.testing.assert_allclose(of_more, expected / 4, rtol=1e-5)
  plain = losses.total_loss(sums, totals, losses.LossWeights())
  np.testing.assert_allclose(plain, nats.mean(), rtol=1e-5)


def test_the_weights_are_those_of_the_chosen_router():
  own = {'load_weight': 0.2, 'importance_weight': 0.3}
  router = {'kind': 'noisy_top_k', 'noisy_top_k': own}
  options = tiny.options(model={'moe': {'router': router}})
  weights = losses.loss_weights(tiny.model_of(options), 0.4)
  assert weights.routers['load_loss'] == 0.2
  assert weights.routers['importance_loss'] == 0.3
  assert (weights.logits_z, weights.num_averaged) == (0.4, 1)


def test_what_has_no_weight_may_be_nan():
  weights = jnp.array([[1.0, 0.0, 2.0]])
  batch = {'loss_weights': weights}
  aux = empty_aux(1, 1)
  nats = jnp.array([[3.0, jnp.nan, 5.0]])

  def total(nats):
    sums = losses.loss_sums(TokenLosses(nats, nats), batch, aux)
    return sums.cross_entropy + sums.logits_z

  assert total(nats) == 2 * (3.0 + 2 * 5.0)
  assert jax.grad(total)(nats).tolist() == [[2.0, 0.0, 4.0]]


# One layer with losses 2 (balance) and 8 (z) over 4 tokens: means 0.5 and 2.
WHOLE = losses.Normalizers(jnp.float32(1), jnp.array([4.0]))
WEIGHTS = losses.LossWeights(
  {'balance_loss': 0.1, 'z_loss': 0.01, 'my_loss': 0}
)
LINE = Linear(factor=1.0, final_factor=0.2, start_step=2, line_steps=4)
HEAVY = tiny.router(balance_weight=0.5, z_weight=0.3)


def total(schedule, step, weights=WEIGHTS):
  weights = schedule.weights(weights, jnp.int32(step))
  return losses.aux_loss(aux([8.0], balance_loss=[2.0]), WHOLE, weights)


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
  assert type(weights.routers['my_loss']) is float
  assert weights.routers['my_loss'] == 0


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
