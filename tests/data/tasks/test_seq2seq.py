"""Rows of pairs: the tokens that are kept, those cut, and their counts."""

import numpy as np
import pytest

from moe_jax.data import (
  DataOptions,
  InstructionSource,
  PrefixLmTask,
  Seq2SeqTask,
  load,
  read_pairs,
)
from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout
from moe_jax.data.tasks.seq2seq import PairRows

EOS = 99


def stream(*texts):
  starts = np.cumsum([0, *(len(text) for text in texts[:-1])])
  return np.concatenate(texts).astype(np.uint8), starts


# The three pairs are a short one, one of long inputs and one of long targets.
INPUTS = stream([1, 2], [3, 4, 5, 6, 7, 8], [9])
TARGETS = stream([11], [12, 13], [14, 15, 16, 17, 18])


@pytest.mark.parametrize(
  ('layout', 'members', 'truncated', 'rows'),
  [
    # Inputs that were cut keep their end of text, and targets that were cut
    # have none.
    (
      EncoderDecoderLayout(5, 4, start_id=EOS), [[0], [1], [2]], 2, [
        ([1, 2, EOS, 0, 0], [EOS, 11, 0, 0], [11, EOS, 0, 0]),
        ([3, 4, 5, 6, EOS], [EOS, 12, 13, 0], [12, 13, EOS, 0]),
        ([9, EOS, 0, 0, 0], [EOS, 14, 15, 16], [14, 15, 16, 17]),
      ],
    ),
    # With room, the first and the last share a row.
    (
      EncoderDecoderLayout(5, 8, start_id=EOS), [[0, 2], [1]], 1, [
        (
          [1, 2, EOS, 9, EOS], [EOS, 11, EOS, 14, 15, 16, 17, 18],
          [11, EOS, 14, 15, 16, 17, 18, EOS],
        ),
      ],
    ),
    # For a decoder alone three targets leave room for 4 inputs. What has no
    # loss is written as 0.
    (
      DecoderLayout(6), [[0], [1], [2]], 2, [
        ([1, 2, EOS, 11, 0, 0], [0, 0, 11, EOS, 0, 0]),
        ([3, 4, 5, EOS, 12, 13], [0, 0, 0, 12, 13, EOS]),
        ([9, EOS, 14, 15, 16, 17], [0, 14, 15, 16, 17, 18]),
      ],
    ),
  ],
)  # fmt: skip
def test_pairs_share_rows_and_long_ones_are_cut(
  layout, members, truncated, rows
):
  pair_rows = PairRows(INPUTS, TARGETS, layout, EOS)
  assert pair_rows.truncated == truncated
  assert [pair_rows.members(r) for r in range(len(pair_rows))] == members
  for r, expected in enumerate(rows):
    row = pair_rows[r]
    learned = row['targets'] * row['loss_weights'].astype(int)
    names = ['encoder_tokens', 'tokens'][1 - len(expected) :]
    found = [*(row[name].tolist() for name in names), learned.tolist()]
    assert found == [*expected]


def test_pairs_are_read_as_texts_with_the_tasks_prefix(tmp_path):
  source = InstructionSource('copy', num_train=9, num_validation=3)
  options = DataOptions(
    source=source, task=Seq2SeqTask(input_prefix='say '), seq_len=99,
    target_len=9, cache_dir=str(tmp_path),
  )  # fmt: skip
  pairs = list(read_pairs(options, 'validation'))
  plain = source.pairs().pairs('validation')
  assert pairs == [(f'say {inputs}', target) for inputs, target in plain]
  dataset = load(options)
  row = dataset.splits['validation'][0]
  text = dataset.tokenizer.decode(row['encoder_tokens'])
  assert text.startswith(pairs[0][0])
  # Of targets of nine tokens or more the end is cut.
  long = sum(len(target) > 8 for _, target in source.pairs().pairs('train'))
  assert dataset.counts['train']['truncated'] == long
  assert f'{long} truncated, ' in dataset.describe()
  # A task that splits windows of a text has no pairs of texts.
  assert read_pairs(DataOptions(task=PrefixLmTask()), 'validation') is None
