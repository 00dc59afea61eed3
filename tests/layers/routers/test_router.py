"""The router module: float32, noise in training alone, losses by the book."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError

from moe_jax.layers import Init, Router, RouterConfig
from moe_jax.routing import CapacityRule
from tests import reference
from tests.models import tiny

G, S, E, K, M = 3, 8, 5, 2, 6
EVERYONE = CapacityRule('all')


def draw(*shape, seed=0, dtype='float32'):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(jnp.dtype(dtype))


def some_mask():
  """A full group, one with three real tokens and one of padding alone."""
  mask = np.ones((G, S), bool)
  mask[1, 3:] = mask[2] = False
  return mask


@functools.cache
def compiled(config, train):
  """One compilation for each pair, shared by the tests."""

  @jax.jit
  def run(params, x, mask, key):
    rngs = None if key is None else {'router': key}
    return Router(config).apply({'params': params}, x, mask, train, rngs=rngs)

  return run


def route(params, x, mask=None, train=False, key=None, **options):
  config = RouterConfig(**{'num_experts': E, **options})
  mask = np.ones(x.shape[:2], bool) if mask is None else mask
  key = None if key is None else tiny.key(key)
  return compiled(config, train)(params, x, mask, key)


@pytest.mark.parametrize('balance_choices', ['all', 'first'])
def test_losses_and_statistics_are_sums_over_groups_by_real_tokens(
  balance_choices,
):
  x, w, w_noise = draw(G, S, M), draw(M, E, seed=1), draw(M, E, seed=2)
  mask = some_mask()
  params = {'w': w, 'w_noise': w_noise}
  capacity = CapacityRule('fixed', slots=2)
  _, aux = route(
    params,
    x,
    mask,
    kind='noisy_top_k',
    num_selected=K,
    gates='renormalized',
    capacity=capacity,
    balance_choices=balance_choices,
  )
  x, w, w_noise = (np.asarray(a, np.float64) for a in (x, w, w_noise))
  logits, std = x @ w, np.log1p(np.exp(x @ w_noise))
  chosen = reference.token_choice(logits, num_selected=K, capacity=2, mask=mask)
  index = chosen.expert_index
  gate = np.array(
    [[reference.relative_gates(logits[g, s], index[g, s]) for s in range(S)]
     for g in range(G)]
  )  # fmt: skip
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
    # The batch's loss is the groups' mean, weighted by real tokens.
    mean = getattr(aux, name) / tokens.sum()
    expected = (per_group * tokens).sum() / tokens.sum()
    assert expected > 0
    np.testing.assert_allclose(mean, expected, rtol=1e-4, err_msg=name)
  expected = reference.routing_stats(chosen, logits, mask)
  assert sum(expected['overflowed']) > 0
  for name, value in aux.stats._asdict().items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-4, err_msg=name)


def test_token_choice_has_importance_and_no_load_to_estimate():
  _, aux = route({'w': draw(M, E)}, draw(G, S, M, seed=1))
  assert aux.importance_loss > 0
  assert aux.load_loss == 0


def test_bfloat16_input_is_routed_in_float32():
  x, w = draw(G, S, 64, dtype='bfloat16'), draw(64, E, seed=1) * 2
  chosen, aux = route({'w': w}, x, capacity=EVERYONE)
  logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  index = logits.argmax(-1)
  np.testing.assert_array_equal(chosen.expert_index[..., 0], index)
  gate = reference.softmax(logits).max(-1)
  np.testing.assert_allclose(chosen.gate[..., 0], gate, rtol=1e-5)
  z = reference.z_loss(logits, np.ones((G, S), bool)).sum() * S
  np.testing.assert_allclose(aux.z_loss, z, rtol=1e-5)
  kinds = {leaf.dtype for leaf in jax.tree.leaves(aux)}
  assert kinds | {chosen.gate.dtype} == {jnp.dtype('float32')}


def test_jitter_multiplies_the_router_input_in_training_alone():
  # Two experts, w = (3, 0) and x = 1: the logits' difference is 3 * jitter.
  params = {'w': np.array([[3.0, 0.0]], np.float32)}
  x = np.ones((G, 100, 1), np.float32)
  options = dict(num_experts=2, jitter=0.2, capacity=EVERYONE)

  def factor(**more):
    gate = np.asarray(route(params, x, **options, **more)[0].gate, np.float64)
    return np.log(gate / (1 - gate)).ravel() / 3

  np.testing.assert_allclose(factor(), 1, rtol=1e-5)
  with pytest.raises(InvalidRngError, match='router'):
    factor(train=True)
  drawn = factor(train=True, key=0)
  assert 0.8 - 1e-4 < drawn.min() < 0.82
  assert 1.18 < drawn.max() < 1.2 + 1e-4
  # U[0.8, 1.2] has deviation 0.115; of a mean of 300 that is 0.0067.
  np.testing.assert_allclose(drawn.mean(), 1, atol=0.03)
  assert len(np.unique(drawn)) > 250
  assert np.abs(factor(train=True, key=1) - drawn).max() > 0.1


NOISES = {
  'noisy_top_k': dict(kind='noisy_top_k', num_selected=K),
  'sampled': dict(second_policy='sampled', num_selected=K),
  'threshold': dict(second_policy='threshold', num_selected=3),
}


@pytest.mark.parametrize('name', NOISES)
def test_noise_is_drawn_from_its_stream_in_training_alone(name):
  options = NOISES[name] | {'capacity': EVERYONE}
  x = draw(G, S, M)
  params = {'w': draw(M, E, seed=1), 'w_noise': draw(M, E, seed=2)}
  if name != 'noisy_top_k':
    del params['w_noise']
  with pytest.raises(InvalidRngError, match='router'):
    route(params, x, train=True, **options)

  def outcome(**more):
    chosen, _ = route(params, x, **options, **more)
    return np.asarray(chosen.gate), np.asarray(chosen.kept)

  gate, kept = outcome()
  assert kept.all()
  first, again, other = (outcome(train=True, key=i)[0] for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - gate).max() > 1e-3
  assert np.abs(first - other).max() > 1e-3


def test_training_without_noise_needs_no_stream():
  params, x = {'w': draw(M, E)}, draw(G, S, M, seed=1)
  for options in ({}, {'second_policy': 'threshold'}):  # K=1 has no second
    trained, _ = route(params, x, train=True, **options)
    evaluated, _ = route(params, x, **options)
    np.testing.assert_array_equal(trained.gate, evaluated.gate)


def test_noisy_top_k_starts_from_zero_and_spreads_by_noise_alone():
  layer = Router(
    RouterConfig(E, K, kind='noisy_top_k', capacity=EVERYONE, init=Init())
  )
  x, mask = draw(G, 100, M), np.ones((G, 100), bool)
  start = jax.jit(layer.init)(tiny.key(0), x, mask)['params']
  params = {name: np.asarray(box.unbox()) for name, box in start.items()}
  assert {name: w.shape for name, w in params.items()} == {
    'w': (M, E),
    'w_noise': (M, E),
  }
  assert not params['w'].any()
  assert not params['w_noise'].any()
  options = dict(kind='noisy_top_k', num_selected=K, capacity=EVERYONE)
  _, still = route(params, x, **options)
  # Equal logits: ties go to the lower experts.
  np.testing.assert_array_equal(still.stats.load, [300, 300, 0, 0, 0])
  _, noisy = route(params, x, train=True, key=0, **options)
  # 600 choices at K/E = 0.4: 120 an expert, deviation sqrt(300 * .24) = 8.5.
  np.testing.assert_allclose(noisy.stats.load, 120, atol=45)
  # The entropy and the z-loss are those of the clean logits, all zero.
  np.testing.assert_allclose(noisy.z_loss / 300, np.log(E) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(num_selected=6), r'num_selected=6 not in \[1, num_experts=5\]'),
    (dict(num_selected=0), r'num_selected=0 not in \[1, num_experts=5\]'),
    (dict(gates='renormalized'), 'with num_selected=1 makes every gate 1'),
    (dict(gates='renormalized_after_drop'), 'with num_selected=1'),
    (dict(gates='raw_'), "unknown gates 'raw_'; did you mean 'raw'"),
    (dict(kind='token_chose'), "did you mean 'token_choice'"),
    (dict(slot_priority='token'), "unknown slot_priority 'token'"),
    (dict(second_policy='random'), "unknown second_policy 'random'"),
    (dict(balance_choices='second'), "unknown balance_choices 'second'"),
    (dict(second_policy='sampled'), 'is defined for num_selected=2, not 1'),
    (
      dict(second_policy='threshold', second_threshold=0.0),
      'second_threshold=0.0',
    ),
    (dict(jitter=1.0), r'jitter=1.0 not in \[0, 1\)'),
    (dict(jitter=-0.1), r'jitter=-0.1 not in'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    RouterConfig(**{'num_experts': E, **options})
