"""Rows of pairs: the tokens that are kept, those cut, and their counts."""

import numpy as np

from moe_jax.data import batch_dataset
from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout
from moe_jax.data.tasks.seq2seq import PairRows

EOS = 99


def stream(*texts):
  starts = np.cumsum([0, *(len(text) for text in texts[:-1])])
  return np.concatenate(texts).astype(np.uint8), starts


# The three pairs are a short one, one of long inputs and one of long targets.
INPUTS = stream([1, 2], [3, 4, 5, 6, 7, 8], [9])
TARGETS = stream([11], [12, 13], [14, 15, 16, 17, 18])


def as_lists(row):
  return {name: values.tolist() for name, values in row.items()}


def test_pairs_share_a_row_and_long_ones_are_cut():
  layout = EncoderDecoderLayout(5, 4, start_id=EOS)
  rows = PairRows(INPUTS, TARGETS, layout, EOS)
  assert len(rows) == 3 and rows.truncated == 2
  assert as_lists(rows[0]) == {
    'encoder_tokens': [1, 2, EOS, 0, 0],
    'encoder_segment_ids': [1, 1, 1, 0, 0],
    'encoder_positions': [0, 1, 2, 0, 0],
    'tokens': [EOS, 11, 0, 0],
    'targets': [11, EOS, 0, 0],
    'segment_ids': [1, 1, 0, 0],
    'positions': [0, 1, 0, 0],
    'loss_weights': [1, 1, 0, 0],
  }
  # Inputs that were cut keep their end of text, and targets that were cut have
  # none.
  assert rows[1]['encoder_tokens'].tolist() == [3, 4, 5, 6, EOS]
  assert rows[1]['targets'].tolist() == [12, 13, EOS, 0]
  assert rows[2]['targets'].tolist() == [14, 15, 16, 17]
  assert rows[2]['tokens'].tolist() == [EOS, 14, 15, 16]


def test_with_room_pairs_share_a_row():
  layout = EncoderDecoderLayout(5, 8, start_id=EOS)
  rows = PairRows(INPUTS, TARGETS, layout, EOS)
  assert [rows.members(r) for r in range(len(rows))] == [[0, 2], [1]]
  assert rows.truncated == 1
  first = as_lists(rows[0])
  assert first['encoder_tokens'] == [1, 2, EOS, 9, EOS]
  assert first['encoder_segment_ids'] == [1, 1, 1, 2, 2]
  assert first['segment_ids'] == [1, 1, 2, 2, 2, 2, 2, 2]
  assert first['tokens'] == [EOS, 11, EOS, 14, 15, 16, 17, 18]
  assert first['targets'] == [11, EOS, 14, 15, 16, 17, 18, EOS]


def test_for_a_decoder_only_model():
  rows = PairRows(INPUTS, TARGETS, DecoderLayout(6), EOS)
  assert as_lists(rows[0]) == {
    'tokens': [1, 2, EOS, 11, 0, 0],
    'targets': [2, EOS, 11, EOS, 0, 0],
    'segment_ids': [1, 1, 1, 1, 0, 0],
    'positions': [0, 1, 2, 3, 0, 0],
    'loss_weights': [0, 0, 1, 1, 0, 0],
  }
  assert rows.truncated == 2
  # Three targets leave room for 4 inputs.
  assert rows[1]['tokens'].tolist() == [3, 4, 5, EOS, 12, 13]
  assert rows[1]['targets'].tolist() == [4, 5, EOS, 12, 13, EOS]
  assert rows[2]['tokens'].tolist() == [9, EOS, 14, 15, 16, 17]


def test_an_epoch_has_every_pair_once():
  generator = np.random.default_rng(0)
  texts = [
    [
      [i + 1, *generator.integers(100, 200, n)]
      for i, n in enumerate(generator.integers(0, 9, 50))
    ]
    for _ in range(2)
  ]
  layout = EncoderDecoderLayout(16, 20, start_id=EOS)
  rows = PairRows(*(stream(*side) for side in texts), layout, EOS)
  assert rows.truncated == 0 and len(rows) < 25
  batch = batch_dataset(rows, batch_size=len(rows), seed=1)[3]  # one epoch
  pairs = {}
  for b in range(len(rows)):
    for s in range(1, batch['segment_ids'][b].max() + 1):
      in_decoder = batch['segment_ids'][b] == s
      in_encoder = batch['encoder_segment_ids'][b] == s
      *inputs, inputs_end = batch['encoder_tokens'][b][in_encoder].tolist()
      *targets, targets_end = batch['targets'][b][in_decoder].tolist()
      assert inputs_end == targets_end == EOS and inputs[0] not in pairs
      pairs[inputs[0]] = inputs, targets
  assert [pairs[i + 1][0] for i in range(50)] == texts[0]
  assert [pairs[i + 1][1] for i in range(50)] == texts[1]
