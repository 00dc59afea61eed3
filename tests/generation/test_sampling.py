"""Kept and drawn tokens equal plain numpy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.generation import sampling

B, V = 3, 7
LOGITS = st.lists(
  st.lists(st.integers(-6, 6), min_size=V, max_size=V), min_size=B, max_size=B
)


def kept_top_k(row, k):
  """Marks the tokens that are at least as likely as the k-th likeliest."""
  return row >= sorted(row)[::-1][min(k, len(row)) - 1]


def kept_top_p(row, p):
  """Marks tokens whose likelier tokens have a probability below p in total."""
  probs = np.exp(row - row.max())
  probs = probs / probs.sum()
  is_kept = [probs[row > logit].sum() < p for logit in row]
  return np.array(is_kept) | (row == row.max())


def test_top_k_and_top_p_told():
  # Probabilities are 0.5, 0.3, 0.15 and 0.05: for p = 0.6 the first is not
  # enough and the second is, and for p = 0.5 the first is exactly enough.
  logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
  is_kept = jnp.isfinite(sampling.keep_top_p(logits, 0.6))
  np.testing.assert_array_equal(is_kept, [[False, True, False, True]])
  is_kept = jnp.isfinite(sampling.keep_top_p(logits, 0.49))
  np.testing.assert_array_equal(is_kept, [[False, True, False, False]])
  is_kept = jnp.isfinite(sampling.keep_top_k(logits, 3))
  np.testing.assert_array_equal(is_kept, [[True, True, False, True]])
  # Equals of the last that stays stay, too.
  logits = jnp.array([[1.0, 3.0, 1.0, 0.0]])
  is_kept = jnp.isfinite(sampling.keep_top_k(logits, 2))
  np.testing.assert_array_equal(is_kept, [[True, True, True, False]])


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(LOGITS, st.integers(1, V + 2), st.floats(0.01, 0.99))
def test_kept_tokens_are_those_of_the_definition(logits, k, p):
  # No sum may equal p exactly, as sums in float32 and float64 can then differ.
  logits = np.array(logits, np.float32)
  logits += np.arange(V, dtype=np.float32) / 1000
  for keep, definition, limit in (
    (sampling.keep_top_k, kept_top_k, k),
    (sampling.keep_top_p, kept_top_p, p),
  ):
    masked_logits = np.asarray(keep(jnp.asarray(logits), limit))
    expected = np.array([definition(row, limit) for row in logits])
    np.testing.assert_array_equal(np.isfinite(masked_logits), expected)
    np.testing.assert_array_equal(masked_logits[expected], logits[expected])


@pytest.mark.parametrize(
  'options', [dict(temperature=0.7), dict(temperature=1.6, top_k=4, top_p=0.7)]
)
def test_draws_follow_the_softmax_of_what_is_kept(options):
  rng = np.random.default_rng(0)
  row = rng.normal(0, 1.2, V).astype(np.float32)
  N = 4000
  sampler = sampling.Sampler.make(**options)
  keys = sampling.row_keys(3, N)
  tokens = sampler(jnp.broadcast_to(jnp.asarray(row)[None], (N, V)), keys)
  share = np.bincount(tokens, minlength=V) / N
  # The definition is temperature first, then top-k, then top-p.
  scaled = row / options['temperature']
  if 'top_k' in options:
    scaled = np.where(kept_top_k(scaled, options['top_k']), scaled, -np.inf)
  if 'top_p' in options:
    scaled = np.where(kept_top_p(scaled, options['top_p']), scaled, -np.inf)
  probs = np.exp(scaled - scaled.max())
  probs /= probs.sum()
  assert (share[probs == 0] == 0).all()
  assert np.abs(share - probs).sum() / 2 < 0.03


def test_a_rows_key_depends_on_no_other_row():
  key_data = jax.random.key_data
  four_keys, two_keys = sampling.row_keys(5, 4), sampling.row_keys(5, 2)
  np.testing.assert_array_equal(key_data(four_keys)[:2], key_data(two_keys))
  seeded_keys = sampling.row_keys([8, 5], 2)
  np.testing.assert_array_equal(
    key_data(seeded_keys)[1:], key_data(sampling.row_keys(5, 1))
  )
  assert len(np.unique(key_data(four_keys), axis=0)) == 4
  steps = [sampling.step_keys(two_keys, jnp.int32(n)) for n in range(3)]
  rows = np.concatenate([key_data(keys) for keys in steps])
  assert len(np.unique(rows, axis=0)) == 6


def test_what_would_be_ignored_is_refused():
  with pytest.raises(ValueError, match=r'top_k=5 and top_p=1\.0 need a temp'):
    sampling.Sampler.make(top_k=5)
