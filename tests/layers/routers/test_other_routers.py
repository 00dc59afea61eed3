"""Routers without logits, and those whose experts choose tokens."""

import numpy as np
import pytest
from flax.errors import InvalidRngError

from moe_jax import All, ExpertChoice, Fixed, Hash, Random, StrictlyBalanced
from moe_jax.layers.routers import Sizes
from tests import reference
from tests.layers.routers import run
from tests.layers.routers.run import IDS, E, G, K, M, S, draw, some_mask

TIGHT = Fixed(slots=2)
X = draw(G, S, M)


def route(options, params=None, key=None, **kwargs):
  """Routes one input, in training if there is a key; returns (routing, aux)."""
  kwargs = {'mask': some_mask(), 'num_selected': K, 'capacity': TIGHT, **kwargs}
  return run.route(options, params, X, key=key, train=key is not None, **kwargs)


@pytest.mark.parametrize('options', [Hash(), Random()], ids=['hash', 'random'])
def test_without_logits_there_is_nothing_to_learn_or_to_balance(options):
  assert not run.start(options, Sizes(E, K, TIGHT))
  assert not options.loss_weights()
  chosen, aux = route(options)
  assert set(np.unique(chosen.gate)) == {0, np.float32(1 / K)}
  np.testing.assert_array_equal(chosen.gate > 0, chosen.kept)
  assert not aux.losses
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
  top_1, _ = route(options, num_selected=1)
  assert set(np.unique(top_1.gate)) == {0, 1}


def test_hash_follows_the_ids_alone():
  for layer in (0, 3):
    chosen, _ = route(Hash(seed=4), layer=layer, capacity=All())
    trained, _ = route(Hash(seed=4), layer=layer, capacity=All(), key=0)
    np.testing.assert_array_equal(chosen.expert_index, trained.expert_index)
    for place, i in np.ndenumerate(IDS):
      expected = reference.hash_choice(int(i), E=E, K=K, seed=4, layer=layer)
      assert chosen.expert_index[place].tolist() == expected


def test_random_is_drawn_anew_in_training_alone():
  def index(options=Random(), **kwargs):
    return np.asarray(route(options, **kwargs)[0].expert_index)

  first, second = index(key=0), index(key=1)
  for other in (first, second, index(layer=1), index(Random(seed=1))):
    assert (other != index()).mean() > 0.5
  assert (first != second).mean() > 0.5
  with pytest.raises(InvalidRngError, match='router'):
    run.route(Random(), x=X, train=True)


def test_expert_choice_losses_and_statistics_are_those_of_the_book():
  w, mask = draw(M, E, seed=1), some_mask()
  chosen, aux = route(ExpertChoice(), {'w': w})
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
  # The groups have eight real tokens, three, and none.
  np.testing.assert_array_equal(aux.stats.load, [2 + 1] * E)
  entropy = -(p := reference.softmax(logits)[mask]) * np.log(p)
  np.testing.assert_allclose(aux.stats.entropy, entropy.sum(), rtol=1e-4)
  assert aux.stats.overflowed.shape == aux.stats.unsent.shape == (K,)


def test_strict_balance_is_of_training_and_thresholds_of_inference():
  options = StrictlyBalanced()
  w, mask = draw(M, E, seed=1), some_mask()
  thresholds = np.full(E, 0.15, np.float32)
  params = {'w': w, 'b_threshold': thresholds}
  logits = np.asarray(X, np.float64) @ np.asarray(w, np.float64)
  trained, aux = route(options, params, key=0, capacity=All())
  inference_routing, inference_aux = route(options, params, capacity=All())
  loss = 0.0
  for g in range(G):
    real, full = mask[g].sum(), -(-K * S // E)
    m = -(-full * real // S)
    *gates, group_loss = reference.strictly_balanced(
      logits[g], m, mask[g], thresholds
    )
    loss += group_loss
    for chosen, gate in zip((trained, inference_routing), gates):
      for e in range(E):
        ids = np.asarray(chosen.token_index[g, e])
        ids = ids[ids < S]
        np.testing.assert_array_equal(np.sort(ids), np.flatnonzero(gate[:, e]))
  np.testing.assert_allclose(aux.load_loss, loss, rtol=1e-3)
  np.testing.assert_allclose(inference_aux.load_loss, loss, rtol=1e-3)
  assert (aux.stats.load == aux.stats.load[0]).all()
  start = run.start(options, Sizes(E, K, All()))['params']
  np.testing.assert_allclose(start['b_threshold'], 1 / E)
