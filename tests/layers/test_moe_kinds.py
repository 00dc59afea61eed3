"""The layer where experts choose, or none does, with every dispatcher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import Dropless, Einsum, Gather
from moe_jax.layers.experts.few_tokens import Batched, Unrolled, unrolled
from moe_jax.layers.routers import ExpertChoice, Hash, Random, TokenChoice
from moe_jax.routing.capacity import All, PerAssignment
from tests import reference
from tests.layers import test_moe
from tests.layers.routers.run import info_of
from tests.layers.test_moe import B, E, K, M, T, draw, draw_params
from tests.models import tiny
from tests.models.tiny import assert_trees_close

IDS = jnp.asarray(np.random.default_rng(5).integers(0, 9, (B, T)), 'int32')


TIGHT = PerAssignment(0.5)


def make(router, capacity=TIGHT, **options):
  return test_moe.make(router, capacity=capacity, **options)


def a_mask():
  mask = np.ones((B, T), bool)
  mask[1, 5:] = False
  return mask


def test_layer_equals_a_loop_over_experts():
  # Groups are half a sequence, in which an expert takes one token.
  layer = make(ExpertChoice(), group_size=4)
  params, x, mask = draw_params(layer), draw(B, T, M, seed=9), a_mask()
  y, aux = jax.jit(layer.apply)({'params': params}, x, mask)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  tokens = np.asarray(x, np.float64).reshape(-1, 4, M)
  index, gate = reference.expert_choice(
    tokens @ p['router']['w'], 1, mask.reshape(-1, 4)
  )
  expected, w = np.zeros(tokens.shape), p['experts']
  for g, e, c in zip(*np.nonzero(index < 4)):
    token = tokens[g, index[g, e, c]]
    h = np.maximum(token @ w['w_in'][e] + w['b_in'][e], 0)
    served = h @ w['w_out'][e] + w['b_out'][e]
    expected[g, index[g, e, c]] += gate[g, e, c] * served
  np.testing.assert_allclose(y, expected.reshape(B, T, M), rtol=1e-4, atol=1e-4)
  lost = ~expected.reshape(B, T, M).any(-1)
  assert (lost & mask).any() and not np.asarray(y)[lost].any()
  np.testing.assert_array_equal(aux.stats.overflowed, [(lost & mask).sum()] * K)


@functools.cache
def gradients(router, dispatch, capacity):
  layer = make(router, capacity, dispatch=dispatch)
  x, target = draw(B, T, M, seed=9), draw(B, T, M, seed=8)
  plain = make(TokenChoice(), capacity)
  params = draw_params(plain)
  if not router.by_expert:
    del params['router']

  def loss(params, x):
    variables = {'params': params}
    y, aux = layer.apply(
      variables, x, jnp.asarray(a_mask()), token_info=info_of(IDS)
    )
    return (y * target).sum(), (y, aux)

  return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize(
  ('router', 'dispatch', 'capacity'),
  [
    pytest.param(ExpertChoice(), Einsum(), TIGHT, marks=pytest.mark.slow),
    (ExpertChoice(), Dropless(), TIGHT),
    (Hash(), Einsum(), TIGHT),
    pytest.param(Random(), Dropless(), All(), marks=pytest.mark.slow),
  ],
)
def test_dispatchers_agree_in_outputs_and_all_gradients(
  router, dispatch, capacity
):
  grads, (y, aux) = expected = gradients(router, Gather(), capacity)
  assert_trees_close(
    gradients(router, dispatch, capacity), expected, rtol=1e-4, atol=1e-4
  )
  assert np.abs(y).max() > 1
  assert (aux.stats.overflowed.sum() > 0) == capacity.binds
  for leaf in jax.tree.leaves(grads):
    assert np.abs(leaf).max() > 1e-2
  assert ('router' in grads[0]) == router.by_expert


@pytest.mark.parametrize(
  ('dispatch', 'capacity'), [(Batched(), TIGHT), (Unrolled(), All())]
)
def test_steps_of_few_tokens_are_the_same_where_experts_choose(
  dispatch, capacity
):
  plain = make(ExpertChoice(), capacity)
  params, x = draw_params(plain), draw(2, T, M, seed=9)
  expected, _ = jax.jit(plain.apply)({'params': params}, x)
  if dispatch == Unrolled():
    params = unrolled(params)
  layer = make(ExpertChoice(), capacity, dispatch=dispatch)
  y, _ = jax.jit(layer.apply)({'params': params}, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_where_all_take_all_every_token_is_weighed_by_its_probabilities():
  layer = make(ExpertChoice(), All(), dispatch=Dropless())
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  ffn = jax.tree.map(lambda leaf: leaf[0], params['experts'])
  params['experts'] = jax.tree.map(lambda leaf: np.stack([leaf] * E), ffn)
  y, _ = jax.jit(layer.apply)({'params': params}, x)
  h = np.maximum(x @ ffn['w_in'] + ffn['b_in'], 0)
  expected = h @ ffn['w_out'] + ffn['b_out']  # since probabilities sum to one
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_outputs_are_masked_where_experts_choose():
  layer = make(ExpertChoice(), output_masking=0.25)
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  y, _ = jax.jit(layer.apply)({'params': params}, x)
  plain, _ = jax.jit(make(ExpertChoice()).apply)({'params': params}, x)
  np.testing.assert_allclose(y, 0.75 * plain, rtol=1e-5, atol=1e-6)
  train = jax.jit(functools.partial(layer.apply, train=True))
  trained, _ = train({'params': params}, x, rngs={'router': tiny.key(0)})
  assert 0 < (np.abs(trained - plain).max(-1) > 1e-4).mean() < 1
