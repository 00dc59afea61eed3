"""Hashed experts equal a loop over ids; hashed inputs by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.routing import hash_choice
from moe_jax.routing.rules_without_logits import (
  HASH_OF,
  hash_ids,
  mixed,
  previous_tokens,
)
from tests import reference

E, K = 7, 3
compiled = jax.jit(
  hash_choice, static_argnames=('num_experts', 'num_selected', 'seed')
)


def choice(ids, seed=0, layer=0, E=E, K=K):
  ids = jnp.asarray(ids).astype(jnp.uint32)[None]
  return np.asarray(
    compiled(
      ids,
      num_experts=E,
      num_selected=K,
      seed=seed,
      layer=jnp.int32(layer),
    )
  )[0]


@pytest.mark.parametrize('seed', [0, -3, 2**40 + 1])
def test_the_definition(seed):
  ids = np.array([0, 1, 2, 255, 50_000, 2**31, 2**32 - 1], np.uint32)
  for layer in (0, 5):
    expected = [
      reference.hash_choice(int(i), E=E, K=K, seed=seed, layer=layer)
      for i in ids
    ]
    np.testing.assert_array_equal(choice(ids, seed, layer), expected)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_k_different_experts_that_are_those_of_equal_ids(ids):
  ids = np.array(ids, np.uint32)
  experts = choice(ids)
  assert ((experts >= 0) & (experts < E)).all()
  assert all(len(set(row)) == K for row in experts)
  np.testing.assert_array_equal(choice(ids[::-1]), experts[::-1])


def test_every_expert_of_every_choice_is_as_likely():
  # 10,000 ids give 10,000 / 7 to each expert, with a standard deviation of 35;
  # the tables of different choices are not shifted copies.
  experts = choice(np.arange(10_000))
  for k in range(K):
    load = np.bincount(experts[:, k], minlength=E)
    np.testing.assert_allclose(load, 10_000 / E, atol=5 * 35)
  pairs = experts[:, 0] * E + experts[:, 1]
  load = np.bincount(pairs, minlength=E * E).reshape(E, E)
  assert not np.diag(load).any()
  np.testing.assert_allclose(
    load[~np.eye(E, dtype=bool)], 10_000 / (E * (E - 1)), atol=5 * 15.4
  )


@pytest.mark.parametrize('other', [dict(seed=1), dict(layer=1)])
def test_seeds_and_layers_have_tables_of_their_own(other):
  ids = np.arange(10_000)
  agreement = (choice(ids)[:, 0] == choice(ids, **other)[:, 0]).mean()
  # They agree as often as by chance, 1/7, with a standard deviation of 0.0035.
  np.testing.assert_allclose(agreement, 1 / E, atol=0.02)


def test_all_experts_may_be_selected():
  np.testing.assert_array_equal(
    np.sort(choice(np.arange(20), E=4, K=4)), np.tile(np.arange(4), (20, 1))
  )


def test_the_scrambling_loses_nothing():
  x = np.arange(2**16, dtype=np.uint32) * np.uint32(65_537)
  hashes = np.asarray(jax.jit(mixed)(x))
  assert len(np.unique(hashes)) == len(x)
  np.testing.assert_array_equal(
    hashes[:50], [reference.scrambled(int(i)) for i in x[:50]]
  )


def test_the_token_before_by_hand():
  tokens = jnp.array([[5, 6, 7, 8], [6, 9, 0, 0]])
  np.testing.assert_array_equal(
    previous_tokens(tokens), [[-1, 5, 6, 7], [-1, 6, 9, 0]]
  )
  # The first row has two documents; the second ends with padding.
  ids = jnp.array([[1, 1, 2, 2], [1, 1, 0, 0]])
  previous = previous_tokens(tokens, ids)
  np.testing.assert_array_equal(previous, [[-1, 5, -1, 7], [-1, 6, -1, 0]])


def test_what_is_hashed():
  # Token 8 follows 5 twice, follows 6, and is first; its positions are 1, 3, 5
  # and 0.
  tokens = jnp.array([[5, 8, 5, 8, 6, 8], [8, 5, 5, 6, 6, 5]])
  positions = jnp.tile(jnp.arange(6), (2, 1))
  hashed_ids = {
    of: np.asarray(hash_ids(of, tokens, previous_tokens(tokens), positions))
    for of in HASH_OF
  }
  eights = {of: [*ids[0, 1::2], ids[1, 0]] for of, ids in hashed_ids.items()}
  assert len(set(eights['token'])) == 1
  assert eights['bigram'][0] == eights['bigram'][1]
  assert len(set(eights['bigram'])) == 3
  assert len(set(eights['position'])) == 4
  np.testing.assert_array_equal(
    hashed_ids['position'][0], hashed_ids['position'][1]
  )
  with pytest.raises(ValueError, match="unknown hash_of 'trigram'"):
    hash_ids('trigram', tokens, tokens, positions)
