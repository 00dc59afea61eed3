"""Routers without logits, and the one whose experts choose: the module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError

from moe_jax.layers import RouterConfig
from moe_jax.layers.routers.router import Router
from moe_jax.routing import CapacityRule
from tests import reference
from tests.layers.routers.test_router import E, G, K, M, S, draw, some_mask
from tests.models import tiny

TIGHT = CapacityRule('fixed', slots=2)
IDS = jnp.asarray(np.random.default_rng(3).integers(0, 9, (G, S)), 'uint32')
X = jnp.asarray(draw(G, S, M))


def config(kind, **options):
  return RouterConfig(
    **{'num_experts': E, 'num_selected': K, 'capacity': TIGHT, **options},
    kind=kind,
  )


def route(config, params=None, key=None, layer=0, ids=IDS, mask=None):
  """(routing, aux) of one input; training where there is a key."""
  mask = some_mask() if mask is None else mask

  @jax.jit
  def run(params, x, mask, layer):
    rngs = None if key is None else {'router': tiny.key(key)}
    variables = {'params': params} if params else {}
    return Router(config).apply(
      variables, x, mask, key is not None, ids, layer, rngs=rngs
    )

  return run(params, X, mask, jnp.int32(layer))


@pytest.mark.parametrize('kind', ['hash', 'random'])
def test_without_logits_there_is_nothing_to_learn_or_to_balance(kind):
  c = config(kind, gates='renormalized')
  start = Router(c).init(tiny.key(0), X, jnp.asarray(some_mask()), hash_ids=IDS)
  assert not jax.tree.leaves(start.get('params', {}))
  chosen, aux = route(c)
  assert set(np.unique(chosen.gate)) == {0, np.float32(1 / K)}
  np.testing.assert_array_equal(chosen.gate > 0, chosen.kept)
  losses = (aux.balance_loss, aux.z_loss, aux.importance_loss, aux.load_loss)
  assert not np.any(losses)
  stats = reference.routing_stats(
    reference.Reference(
      np.asarray(chosen.expert_index), chosen.slot, chosen.gate, chosen.kept,
      np.where(chosen.kept, 'served', 'full'),
    ),
    np.zeros((G, S, E)), some_mask(),
  )  # fmt: skip
  assert sum(stats['overflowed']) > 0
  for name in ('tokens', 'load', 'kept_load', 'overflowed'):
    np.testing.assert_array_equal(getattr(aux.stats, name), stats[name])
  assert aux.stats.entropy == aux.stats.logit_square == 0
  one = config(kind, num_selected=1, gates='renormalized')
  assert set(np.unique(route(one)[0].gate)) == {0, 1}


def test_hash_follows_the_ids_alone():
  c = config('hash', seed=4, capacity=CapacityRule('all'))
  for layer in (0, 3):
    chosen, _ = route(c, layer=layer)
    trained, _ = route(c, layer=layer, key=0)
    np.testing.assert_array_equal(chosen.expert_index, trained.expert_index)
    expected = [
      [
        reference.hash_choice(int(i), E=E, K=K, seed=4, layer=layer)
        for i in row
      ]
      for row in IDS
    ]
    np.testing.assert_array_equal(chosen.expert_index, expected)
  with pytest.raises(ValueError, match="router='hash' needs hash_ids"):
    route(c, ids=None)


def test_random_is_drawn_anew_in_training_alone():
  c = config('random')

  def index(c=c, **more):
    return np.asarray(route(c, **more)[0].expert_index)

  others = [index(key=0), index(key=1), index(layer=1)]
  others.append(index(config('random', seed=1)))
  for other in others:
    assert (other != index()).mean() > 0.5
  assert (others[0] != others[1]).mean() > 0.5
  with pytest.raises(InvalidRngError, match='router'):
    Router(c).apply({}, X, jnp.asarray(some_mask()), True)


def test_expert_choice_losses_and_statistics_are_those_of_the_book():
  w, mask = draw(M, E, seed=1), some_mask()
  chosen, aux = route(config('expert_choice'), {'w': w})
  logits = np.asarray(X, np.float64) @ np.asarray(w, np.float64)
  index, gate = reference.expert_choice(logits, 2, mask)
  np.testing.assert_array_equal(chosen.token_index, index)
  np.testing.assert_allclose(chosen.gate, gate, rtol=1e-4)
  tokens = mask.sum(1)
  z = (reference.z_loss(logits, mask) * tokens).sum()
  np.testing.assert_allclose(aux.z_loss, z, rtol=1e-4)
  importance = [
    (row.std() / row.mean()) ** 2 if row.any() else 0 for row in gate.sum(-1)
  ]
  np.testing.assert_allclose(
    aux.importance_loss, (importance * tokens).sum(), rtol=1e-3
  )
  assert aux.balance_loss == aux.load_loss == 0
  # Eight real tokens of the first group, three of the second, none.
  np.testing.assert_array_equal(aux.stats.load, [2 + 1] * E)
  entropy = -(p := reference.softmax(logits)[mask]) * np.log(p)
  np.testing.assert_allclose(aux.stats.entropy, entropy.sum(), rtol=1e-4)
  assert aux.stats.overflowed.shape == aux.stats.unsent.shape == (K,)


def test_strict_balance_is_of_training_and_thresholds_of_inference():
  c = config('strictly_balanced', capacity=CapacityRule('all'))
  w, mask = draw(M, E, seed=1), some_mask()
  thresholds = np.full(E, 0.15, np.float32)
  params = {'w': w, 'b_threshold': thresholds}
  logits = np.asarray(X, np.float64) @ np.asarray(w, np.float64)
  trained, aux = route(c, params, key=0)
  found, same = route(c, params)
  loss = 0.0
  for g in range(G):
    real, full = mask[g].sum(), -(-K * S // E)
    m = -(-full * real // S)
    *gates, own = reference.strictly_balanced(logits[g], m, mask[g], thresholds)
    loss += own
    for chosen, gate in zip((trained, found), gates):
      for e in range(E):
        who = np.asarray(chosen.token_index[g, e])
        who = who[who < S]
        np.testing.assert_array_equal(np.sort(who), np.flatnonzero(gate[:, e]))
  np.testing.assert_allclose(aux.load_loss, loss, rtol=1e-3)
  np.testing.assert_allclose(same.load_loss, loss, rtol=1e-3)
  assert (aux.stats.load == aux.stats.load[0]).all()
  start = Router(c).init(tiny.key(0), X, jnp.asarray(mask))['params']
  np.testing.assert_allclose(start['b_threshold'].value, 1 / E)


def test_factor_one_for_each_of_two_choices_is_the_papers_two():
  rule = CapacityRule('per_assignment', factor=1.0)
  chosen, _ = route(
    config('expert_choice', capacity=rule, num_experts=4),
    {'w': draw(M, 4)},
    mask=np.ones((G, S), bool),
  )
  assert chosen.capacity == 2 * S // 4
  assert chosen.filled.sum() == 2 * G * S


@pytest.mark.parametrize(
  ('kind', 'options', 'message'),
  [
    ('expert_choice', dict(gates='renormalized'), 'gates=.*leave it .raw.'),
    ('expert_choice', dict(slot_priority='choice_major'), 'slot_priority='),
    ('expert_choice', dict(balance_bias_rate=0.1), 'balance_bias_rate=0.1'),
    ('strictly_balanced', dict(gates='sigmoid'), "gates='sigmoid' has no"),
    ('noisy_top_k', dict(balance_bias_rate=0.1), 'no meaning.*noisy_top_k'),
    ('hash', dict(balance_bias_rate=0.1), 'balance_bias_rate=0.1'),
    ('hash', dict(hash_of='word'), "unknown hash_of 'word'"),
    ('hash', dict(jitter=0.1), "jitter=0.1 has no meaning with router='hash'"),
    ('random', dict(use_bias=True), 'use_bias=True has no meaning'),
    ('random', dict(second_policy='sampled'), "second_policy='sampled' has no"),
    ('random', dict(slot_priority='batch_priority'), 'no probabilities'),
    ('random', dict(num_selected=6), 'num_selected=6 not in'),
  ],
)
def test_options_that_would_do_nothing_are_refused(kind, options, message):
  with pytest.raises(ValueError, match=message):
    config(kind, **options)
