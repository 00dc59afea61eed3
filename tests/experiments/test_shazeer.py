"""The studies of arXiv:1701.06538 measure balance by batch, and thresholds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import shazeer_appendix_f, shazeer_table6
from moe_jax.layers.experts import Dropless
from moe_jax.layers.positions import NoPositions
from moe_jax.layers.routers import NoisyTopK, StrictlyBalanced
from moe_jax.routing.capacity import All
from tests.models import tiny
from tests.models.tiny import B, T

E, K = shazeer_appendix_f.E, shazeer_appendix_f.K
ROOM = dict(num_experts=E, num_selected=K, capacity=All(), dispatch=Dropless())


def batch_of(tokens):
  """A batch of which the last two tokens of the first row are padding."""
  segments = jnp.ones((B, T), jnp.int32).at[0, -2:].set(0)
  return {
    'tokens': jnp.asarray(tokens),
    'targets': jnp.asarray(np.roll(tokens, -1, axis=1)),
    'segment_ids': segments,
    'positions': 0 * segments,
    'loss_weights': jnp.float32(segments > 0),
  }


def test_importance_and_loads_are_of_one_batch():
  router = NoisyTopK(gates='renormalized', z_weight=0.0)
  model = tiny.build(dict(layers='all', router=router, group_size=-1, **ROOM))
  batch = batch_of(tiny.tokens(3))
  variables = {'params': tiny.params_of(model)}
  key = jax.random.key(3)
  balance = shazeer_table6.balance(model)
  numbers = np.asarray(balance(variables, batch, key, True))
  apply = functools.partial(
    model.apply,
    train=True,
    rngs={'router': key, 'dropout': key},
    mutable=['intermediates'],
  )
  (_, aux), collections = jax.jit(apply)(variables, **model.inputs(batch))
  real = np.asarray(batch['segment_ids']).reshape(-1) > 0
  layers = model.stacks.layer_trees(collections['intermediates'])
  for i, layer in enumerate(layers):
    (routing,) = layer['moe']['router']['routing']
    counts = np.bincount(
      np.asarray(routing.expert_index).reshape(-1, K)[real].ravel()
    )
    np.testing.assert_allclose(numbers[3, i], counts.max() / counts.mean())
  # CV^2 of Load is the load loss, which has plain loops of its own as a test.
  n = np.asarray(aux.stats.tokens)
  np.testing.assert_allclose(numbers[1] ** 2, aux.load_loss / n, rtol=1e-4)
  np.testing.assert_allclose(
    numbers[0] ** 2, aux.importance_loss / n, rtol=1e-4
  )
  assert (numbers[2] > 1 + numbers[1] / np.sqrt(E)).all()


def test_agreement_is_of_the_pairs_that_either_makes():
  one = jnp.array([[True, True, False, False], [True, False, False, False]])
  other = jnp.array([[True, False, True, False], [True, False, False, False]])
  assert shazeer_appendix_f.agreement(one, other) == 0.5  # 2 of 4


@functools.cache
def small():
  """A model whose experts choose by thresholds, its variables and a batch."""
  moe = dict(
    **ROOM,
    layers='1',
    router=StrictlyBalanced(),
    allow_future_leak=True,
    group_size=0,
  )
  model = tiny.build(moe, kind='lstm', positions=NoPositions(), num_layers=3)
  variables = {'params': tiny.params_of(model)}
  return model, variables, batch_of(tiny.tokens(3))


@functools.partial(jax.jit, static_argnames='train')
def losses(variables, batch, train):
  """Loss of each token in nats, [B, T], by the model's own call."""
  model, _, _ = small()
  keys = {'router': jax.random.key(0)}
  inputs = model.inputs(batch)
  logits, _ = model.apply(variables, **inputs, train=train, rngs=keys)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['targets']
  )


@pytest.mark.slow
def test_thresholds_that_all_or_none_pass():
  model, variables, batch = small()
  # In training each expert takes m = ceil(K T / E) of a row's T tokens, and the
  # same share of the shorter row.
  m = -(-K * T // E)
  short = -(-m * (T - 2) // T)
  share = ((B - 1) * m + short) / (B * T - 2)
  for value, passing in ((0.0, 1), (2.0, 0)):
    changed = shazeer_appendix_f.with_thresholds(variables, value)
    metrics = shazeer_appendix_f.compare(model, changed, batch, batch)
    assert (metrics['experts'], metrics['none']) == (E * passing, 1 - passing)
    np.testing.assert_allclose(metrics['agreement'], share * passing, rtol=1e-6)
    assert 0 < metrics['unlearned'] < 1 and metrics['foreseen'] == 0


@pytest.mark.slow
def test_losses_are_those_of_each_choice():
  model, variables, batch = small()
  variables = shazeer_appendix_f.with_thresholds(variables, 0.1)
  # Other tokens stand in the second half of each row.
  foreign = batch | {'tokens': batch['tokens'].at[:, T // 2 :].set(5)}
  metrics = shazeer_appendix_f.compare(model, variables, batch, foreign)
  trained = losses(variables, batch, True)
  weights = batch['loss_weights']
  lost = losses(variables, batch, False) - trained
  expected = (lost * weights).sum() / weights.sum()
  np.testing.assert_allclose(metrics['lost'], expected, atol=1e-5)
  # The last token of the first half is left out, since its target is in the
  # second half.
  foreseen = losses(variables, foreign, True) - trained
  expected = foreseen[:, : T // 2 - 1].mean()
  np.testing.assert_allclose(metrics['foreseen'], expected, atol=1e-5)
  assert min(abs(metrics['lost']), abs(metrics['foreseen'])) > 1e-4
