"""Tokens that count in calibration, and their number for each expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import calibration, kernel_inputs
from moe_jax.compression.kernel_inputs import ExpertTokens
from moe_jax.data import tokenizers
from moe_jax.routing import token_choice


def test_special_tokens_do_not_count():
  t = tokenizers.Extended(
    tokenizers.Bytes(), ['<eos>', '<extra_id_0>'], end_inputs=False
  )
  eos, mask = t.eos_id, t.sentinel_ids[0]
  batch = {
    'tokens': np.array([[5, 6, mask, 7, eos, 9]]),
    'targets': np.array([[6, mask, 7, eos, 9, 0]]),
    'segment_ids': np.array([[1, 1, 1, 1, 1, 0]]),
  }
  # The token before a mask in a decoder, masks, ends and padding do not count.
  assert kernel_inputs.counted(batch, '', t).tolist() == [
    [True, False, False, True, False, False]
  ]
  encoder = {f'encoder_{name}': value for name, value in batch.items()}
  assert kernel_inputs.counted(encoder, 'encoder_', t).tolist() == [
    [True, True, False, True, False, False]
  ]


def test_an_expert_has_at_most_four_times_the_mean():
  S, E = 40, 8
  logits = np.zeros((1, S, E), np.float32)
  logits[..., 0], logits[:, 30:, 1] = 1.0, 2.0
  choose = functools.partial(token_choice, num_selected=1, capacity=None)
  routing = jax.jit(choose)(logits)
  x = jnp.asarray(np.arange(S, dtype=np.float32)[None, :, None])
  routed_tokens = calibration.RoutedTokens(x, routing)
  counted = np.arange(S)[None] >= 5
  tokens = ExpertTokens([routed_tokens], [counted])
  # 35 tokens count, so that the cap is 4 * 35 / 8, rounded up: 18 of 25.
  rows = tokens.rows(slice(0, 3))
  assert rows.filled.sum(1).tolist() == [18, 10, 0]
  assert rows.x[0, :18, 0].tolist() == list(range(5, 23))
  assert rows.x[1, :10, 0].tolist() == list(range(30, 40))
  assert tokens.without_tokens == [2, 3, 4, 5, 6, 7]
