"""Hashed experts equal a loop over ids; hashed inputs by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import hash_choice
from moe_jax.routing.rules_without_logits import (
  HASH_OF,
  hash_ids,
  previous_tokens,
)
from tests import reference

E, K = 7, 3
compiled = jax.jit(
  hash_choice, static_argnames=('num_experts', 'num_selected', 'seed')
)


def choice(ids, seed=0, layer=0, E=E, K=K):
  ids = jnp.asarray(np.array(ids, np.uint32))[None]
  return np.asarray(
    compiled(
      ids, num_experts=E, num_selected=K, seed=seed, layer=jnp.int32(layer)
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
  # All experts may be selected.
  expected = [
    reference.hash_choice(i, E=4, K=4, seed=seed, layer=0) for i in range(20)
  ]
  np.testing.assert_array_equal(choice(range(20), seed, E=4, K=4), expected)


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
