"""Routers that choose by logits: float32, noise in training, losses.

Losses and statistics are judged by the loops of `tests/reference.py`, noise and
rounding by told logits. Which expert a token gets is in `tests/routing`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError

from moe_jax import All, Fixed, NoisyTopK, TokenChoice
from moe_jax.layers.routers import Sizes
from moe_jax.layers.routers.contract import sown
from moe_jax.layers.routers.noisy_top_k import LOAD
from tests import reference
from tests.layers.routers import run
from tests.layers.routers.run import E, G, K, M, S, draw, route, some_mask


@pytest.mark.parametrize('balance_choices', ['all', 'first'])
def test_losses_and_statistics_are_sums_over_groups_by_real_tokens(
  balance_choices,
):
  x, w, w_noise = draw(G, S, M), draw(M, E, seed=1), draw(M, E, seed=2)
  mask = some_mask()
  _, aux = route(
    NoisyTopK(gates='renormalized', balance_choices=balance_choices),
    {'w': w, 'w_noise': w_noise},
    x,
    mask,
    num_selected=K,
    capacity=Fixed(slots=2),
  )
  x, w, w_noise = (np.asarray(a, np.float64) for a in (x, w, w_noise))
  logits, std = x @ w, np.log1p(np.exp(x @ w_noise))
  chosen = reference.token_choice(logits, num_selected=K, capacity=2, mask=mask)
  index = chosen.expert_index
  gate = np.zeros(index.shape)
  for g, s in np.ndindex(G, S):
    gate[g, s] = reference.relative_gates(logits[g, s], index[g, s])
  probability = reference.load_probability(logits, logits, std, K)
  tokens = mask.sum(1)
  losses = {
    'balance_loss': reference.balance_loss(
      reference.softmax(logits), index, mask, balance_choices
    ),
    'z_loss': reference.z_loss(logits, mask),
    'importance_loss': reference.importance_loss(gate, index, mask, E),
    'load_loss': reference.load_loss(probability, mask),
  }
  for name, per_group in losses.items():
    # The batch's loss is the mean over groups, weighted by real tokens.
    mean = getattr(aux, name) / tokens.sum()
    expected = (per_group * tokens).sum() / tokens.sum()
    assert expected > 0
    np.testing.assert_allclose(mean, expected, rtol=1e-4, err_msg=name)
  expected = reference.routing_stats(chosen, logits, mask)
  assert sum(expected['overflowed']) > 0
  for name, value in aux.stats._asdict().items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-4, err_msg=name)


def test_importance_is_that_of_gates_with_their_noise():
  params = {'w': draw(M, E, seed=1), 'w_noise': draw(M, E, seed=2)}
  x, mask = draw(G, S, M), some_mask()
  chosen, aux = route(
    NoisyTopK(), params, x, mask, num_selected=K, train=True, key=0
  )
  importance = reference.importance_loss(
    np.asarray(chosen.gate), np.asarray(chosen.expert_index), mask, E
  )
  np.testing.assert_allclose(
    aux.importance_loss, (importance * mask.sum(1)).sum(), rtol=1e-5
  )


def test_the_load_that_is_kept_for_analysis_is_that_of_real_tokens():
  x, mask = draw(G, S, M), some_mask()
  params = {'w': draw(M, E, seed=1), 'w_noise': draw(M, E, seed=2)}
  router = run.module(NoisyTopK(), Sizes(E, K, All()))

  @jax.jit
  def kept(x, mask):
    variables = {'params': params}
    return router.apply(variables, x, mask, mutable=['intermediates'])[1]

  load = sown(kept(x, mask)['intermediates'])[LOAD]
  clean = x.astype(np.float64) @ params['w']
  std = np.log1p(np.exp(x.astype(np.float64) @ params['w_noise']))
  probability = reference.load_probability(clean, clean, std, K)
  expected = np.where(mask[..., None], probability, 0.0).sum(1)
  np.testing.assert_allclose(load, expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_input_is_routed_in_float32():
  x, w = draw(G, S, 64, dtype='bfloat16'), draw(64, E, seed=1) * 2
  chosen, aux = route(params={'w': w}, x=x)
  logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  index = logits.argmax(-1)
  np.testing.assert_array_equal(chosen.expert_index[..., 0], index)
  gate = reference.softmax(logits).max(-1)
  np.testing.assert_allclose(chosen.gate[..., 0], gate, rtol=1e-5)
  z = reference.z_loss(logits, np.ones((G, S), bool)).sum() * S
  np.testing.assert_allclose(aux.z_loss, z, rtol=1e-5)
  kinds = {leaf.dtype for leaf in jax.tree.leaves(aux)}
  assert kinds | {chosen.gate.dtype} == {jnp.dtype('float32')}


def factors_of_input(options, **kwargs):
  """Factors of 300 inputs, as with w = (3, 0) and x = 1 logits differ by 3."""
  params = {'w': np.array([[3.0, 0.0]], np.float32)}
  x = np.ones((G, 100, 1), np.float32)
  chosen, _ = route(options, params, x, num_experts=2, ids=None, **kwargs)
  gate = np.asarray(chosen.gate, np.float64).ravel()
  return np.log(gate / (1 - gate)) / 3


def test_jitter_multiplies_the_router_input_in_training_alone():
  factor = functools.partial(factors_of_input, TokenChoice(jitter=0.2))

  np.testing.assert_allclose(factor(), 1, rtol=1e-5)
  with pytest.raises(InvalidRngError, match='router'):
    factor(train=True)
  factors = factor(train=True, key=0)
  assert 0.8 - 1e-4 < factors.min() < 0.82
  assert 1.18 < factors.max() < 1.2 + 1e-4
  # The standard deviation of U[0.8, 1.2] is 0.115, and that of a mean of 300
  # draws 0.0067.
  np.testing.assert_allclose(factors.mean(), 1, atol=0.03)
  assert len(np.unique(factors)) > 250
  assert np.abs(factor(train=True, key=1) - factors).max() > 0.1


def test_sampled_choices_follow_the_probabilities_in_training_alone():
  # Three of four tokens, on average, go to the first expert, and one to the
  # second; the third is never drawn.
  params = {'w': np.log(np.array([[3.0, 1.0, 1e-9]], np.float32))}
  x = np.ones((G, 400, 1), np.float32)

  def routed(**kwargs):
    options = TokenChoice(choice_policy='sampled')
    chosen, _ = route(options, params, x, num_experts=3, ids=None, **kwargs)
    return np.asarray(chosen.expert_index).ravel(), np.asarray(chosen.gate)

  index, _ = routed()
  assert not index.any()
  index, gate = routed(train=True, key=0)
  assert set(index) == {0, 1}
  # The standard deviation of a share of 1200 draws is 0.0125.
  np.testing.assert_allclose((index == 0).mean(), 0.75, atol=0.05)
  # A gate is the probability of the expert that was drawn.
  np.testing.assert_allclose(
    gate.ravel(), np.where(index, 0.25, 0.75), rtol=1e-5
  )
  top_2, _ = routed(train=True, key=0, num_selected=2)
  assert (np.sort(top_2.reshape(-1, 2)) == [0, 1]).all()


def test_dropout_of_the_input_is_of_the_router_in_training_alone():
  options = TokenChoice(input_dropout=0.2)
  np.testing.assert_allclose(factors_of_input(options), 1, rtol=1e-5)
  factors = factors_of_input(options, train=True, key=0)
  dropped = np.isclose(factors, 0, atol=1e-5)
  np.testing.assert_allclose(factors[~dropped], 1 / 0.8, rtol=1e-4)
  # The standard deviation of a share of 300 draws is 0.023.
  np.testing.assert_allclose(dropped.mean(), 0.2, atol=0.09)


def test_rounded_logits_are_those_of_bfloat16():
  # The example of ST-MoE: ten logits are 128 and one is 128.5, which is 128 in
  # bfloat16, so that its probability is 1 / 11 instead of 0.142.
  w = np.full((1, 11), 128, np.float32)
  w[0, 10] = 128.5
  x = np.ones((1, 1, 1), np.float32)
  choices = {}
  for dtype in ('float32', 'bfloat16'):
    options = TokenChoice(logits_dtype=dtype)
    chosen, _ = route(options, {'w': w}, x, num_experts=11, ids=None)
    choices[dtype] = int(chosen.expert_index.item()), float(chosen.gate.item())
  assert choices['float32'][0] == 10 and choices['bfloat16'][0] == 0
  np.testing.assert_allclose(choices['float32'][1], 0.1415, atol=1e-3)
  expected = float(jnp.float32(1 / 11).astype(jnp.bfloat16))
  assert choices['bfloat16'][1] == expected


@pytest.mark.parametrize('rounded', ['input', 'kernel'])
def test_what_logits_are_made_of_is_rounded_too(rounded):
  # The first logit is 128.5 - 128, or 128 - 128 once a factor is rounded.
  large, signs = np.array([128.5, 128]), np.array([1.0, -1.0])
  x, column = (large, signs) if rounded == 'input' else (signs, large)
  w = np.stack([column, np.zeros(2)], 1).astype(np.float32)
  x = x.astype(np.float32)[None, None]
  gates = [
    route(
      TokenChoice(logits_dtype=dtype), {'w': w}, x, num_experts=2, ids=None
    )[0].gate.item()
    for dtype in ('float32', 'bfloat16')
  ]
  np.testing.assert_allclose(gates[0], 1 / (1 + np.exp(-0.5)), rtol=1e-5)
  assert gates[1] == 0.5


NOISES = {
  'noisy_top_k': (NoisyTopK(), K),
  'sampled': (TokenChoice(second_policy='sampled'), K),
  'threshold': (TokenChoice(second_policy='threshold'), 3),
}


@pytest.mark.parametrize('name', NOISES)
def test_noise_is_drawn_from_its_stream_in_training_alone(name):
  options, num_selected = NOISES[name]
  x = draw(G, S, M)
  params = {'w': draw(M, E, seed=1), 'w_noise': draw(M, E, seed=2)}
  if name != 'noisy_top_k':
    del params['w_noise']
  sizes = dict(num_selected=num_selected)
  with pytest.raises(InvalidRngError, match='router'):
    route(options, params, x, train=True, **sizes)

  def routed(**kwargs):
    chosen, _ = route(options, params, x, **sizes, **kwargs)
    return np.asarray(chosen.gate), np.asarray(chosen.kept)

  gate, kept = routed()
  assert kept.all()
  first, repeated, other = (routed(train=True, key=i)[0] for i in (0, 0, 1))
  np.testing.assert_array_equal(first, repeated)
  assert np.abs(first - gate).max() > 1e-3
  assert np.abs(first - other).max() > 1e-3


def test_noisy_top_k_starts_from_zero_and_spreads_by_noise_alone():
  x = draw(G, 100, M)
  params = run.start(NoisyTopK(), Sizes(E, K, All()), x)['params']
  shapes = {name: w.shape for name, w in params.items()}
  assert shapes == {'w': (M, E), 'w_noise': (M, E)}
  assert not params['w'].any() and not params['w_noise'].any()
  options = dict(num_selected=K, ids=None)
  _, clean = route(NoisyTopK(), params, x, **options)
  # Logits are equal: ties go to experts of lower number.
  np.testing.assert_array_equal(clean.stats.load, [300, 300, 0, 0, 0])
  _, noisy = route(NoisyTopK(), params, x, train=True, key=0, **options)
  # 600 choices with K/E = 0.4 give 120 to an expert, with a standard deviation
  # of sqrt(300 * .24) = 8.5.
  np.testing.assert_allclose(noisy.stats.load, 120, atol=45)
  # Entropy and z-loss are those of the logits without noise, which are zero.
  np.testing.assert_allclose(noisy.z_loss / 300, np.log(E) ** 2, rtol=1e-5)


def test_a_balancing_bias_moves_choices_and_leaves_gates_and_losses_to_logits():
  w, bias = draw(M, E), np.array([0.0, 0.0, 0.0, 0.0, 9.0], np.float32)
  options = TokenChoice(gates='sigmoid', balance_bias_rate=0.1)
  state = {'balance_bias': jnp.asarray(bias)}
  chosen, aux = route(options, {'w': w}, state=state)
  assert (np.asarray(chosen.expert_index) == 4).all()
  logits = draw(G, S, M).astype(np.float64) @ w
  gate = 1 / (1 + np.exp(-logits[..., 4:]))
  np.testing.assert_allclose(chosen.gate, gate, rtol=1e-4)
  z = reference.z_loss(logits, np.ones((G, S), bool)).sum() * S
  np.testing.assert_allclose(aux.z_loss, z, rtol=1e-4)


def test_batch_priority_under_a_bias_serves_the_surest_token_first():
  # The bias sends both tokens to expert 1, which has one slot. The second token
  # prefers expert 0, and with a larger probability than any of the first
  # token's.
  options = TokenChoice(
    slot_priority='batch_priority',
    balance_bias_rate=0.1,
    balance_bias_scores='softmax',
  )
  x = np.log(np.array([[[0.5, 0.4, 0.1], [0.9, 0.06, 0.04]]], np.float32))
  chosen, _ = route(
    options,
    {'w': np.eye(3, dtype=np.float32)},
    x,
    num_experts=3,
    capacity=Fixed(slots=1),
    ids=None,
    state={'balance_bias': jnp.array([0.0, 5.0, 0.0])},
  )
  np.testing.assert_array_equal(chosen.expert_index, [[[1], [1]]])
  np.testing.assert_array_equal(chosen.kept, [[[False], [True]]])
