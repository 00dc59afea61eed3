"""The cache by slot, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention.cache import KVCache

L, B, N, S, D = 3, 2, 1, 5, 4


def empty(stacked=True):
  return KVCache.make(
    lengths=(S,) * L, stacked=stacked, batch_size=B, max_len=S, 
    shapes=((N, D), (N, D)), dtype='float32',
  )  # fmt: skip


@pytest.mark.parametrize('stacked', [True, False])
def test_rows_of_unequal_length_share_their_slots(stacked):
  # The prompts have three tokens and one, padded at their start; then each row
  # gets one token.
  cache, layer = empty(stacked), jnp.int32(1) if stacked else 1
  mask = jnp.array([[True, True, True], [False, False, True]])
  cache, positions = cache.begin(mask)
  np.testing.assert_array_equal(positions, [[0, 1, 2], [0, 0, 0]])
  keys = jnp.arange(B * 3 * N * D, dtype=jnp.float32).reshape(B, 3, N, D)
  cache = cache.write(layer, keys, -keys).advance(3)
  cache, positions = cache.begin(jnp.ones((B, 1), bool))
  np.testing.assert_array_equal(positions, [[3], [1]])
  cache = cache.write(layer, keys[:, :1] + 100, keys[:, :1]).advance(1)
  assert int(cache.length) == 4
  np.testing.assert_array_equal(
    cache.filled, [[1, 1, 1, 1, 0], [0, 0, 1, 1, 0]]
  )
  np.testing.assert_array_equal(cache.next_position, [4, 2])
  cached_keys = np.asarray(cache.slots(layer).key)  # [B, N, S, D]
  np.testing.assert_array_equal(cached_keys[:, :, :3], keys.swapaxes(1, 2))
  np.testing.assert_array_equal(cached_keys[:, 0, 3], keys[:, 0, 0] + 100)
  assert not cached_keys[:, :, 4].any()
  assert not np.asarray(cache.key[0]).any()
  assert not np.asarray(cache.key[2]).any()


@pytest.mark.parametrize('stacked', [True, False])
def test_take_repeats_and_reorders_rows(stacked):
  keys = jnp.arange(L * B * N * S * D, dtype=jnp.float32)
  keys = keys.reshape(L, B, N, S, D)
  cache = empty(stacked).replace(
    key=keys if stacked else tuple(keys), next_position=jnp.array([7, 9])
  )
  reordered = cache.take(jnp.array([1, 1, 0]))
  np.testing.assert_array_equal(reordered.next_position, [9, 9, 7])
  for row, source in enumerate([1, 1, 0]):
    for i in range(L):
      np.testing.assert_array_equal(reordered.key[i][row], keys[i, source])
  assert reordered.filled.shape == (3, S)


@pytest.mark.parametrize('stacked', [True, False])
def test_a_layer_with_a_window_keeps_as_many_slots(stacked):
  # Layers keep 3 slots of 8. Steps have 4 tokens, 1, 2 and 1; the first two of
  # the second row are padding. Token s has the key s + 1.
  length, layer = 3, jnp.int32(1) if stacked else 1
  cache = KVCache.make(
    lengths=(length,) * 2, stacked=stacked, batch_size=B, max_len=8,
    shapes=((N, D), (N, 0)), dtype='float32',
  )  # fmt: skip
  real = np.arange(8)[None] >= np.array([[0], [2]])

  @jax.jit
  def step(cache, real, keys):
    cache, _ = cache.begin(real)
    cache, slots = cache.append(layer, keys, keys[..., :0])
    slot_arrays = slots.numbers, slots.filled, slots.key
    return cache.advance(real.shape[1]), *slot_arrays

  first = 0
  for count in (4, 1, 2, 1):
    stop = first + count
    new = np.arange(first, stop, dtype=np.float32) + 1
    keys = np.broadcast_to(new[None, :, None, None], (B, count, N, D))
    cache, *slots = step(cache, real[:, first:stop], keys)
    tokens, filled, key = map(np.asarray, slots)
    # The slots hold all tokens in the window of the step's first one, and more.
    window_tokens = set(range(max(first - 2, 0), stop))
    assert window_tokens <= set(tokens.tolist())
    for slot, token in enumerate(tokens):
      expected = np.array([token >= 0, token >= 2])
      np.testing.assert_array_equal(filled[:, slot], expected)
      if token >= 0:
        assert key[0, 0, slot, 0] == token + 1
    cached_keys = np.asarray(cache.slots(layer).key)
    assert cached_keys.shape == (B, N, length, D)
    for token in range(max(stop - length, 0), stop):
      assert cached_keys[0, 0, token % length, 0] == token + 1
    first = stop
