"""Rows of examples, by hand, and which lengths fit."""

import numpy as np
import pytest

from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout, Example

# The two examples are `1 2 3 -> 4 5` and `6 -> 7 8 9`; a decoder starts with
# 99.
ROW = [
  Example(np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32)),
  Example(np.array([6], np.int32), np.array([7, 8, 9], np.int32)),
]


def as_lists(batch):
  return {name: values.tolist() for name, values in batch.items()}


def test_an_encoder_decoder_row():
  batch = EncoderDecoderLayout(5, 7, start_id=99).assemble([ROW, []])
  assert as_lists({name: v[0] for name, v in batch.items()}) == {
    'encoder_tokens': [1, 2, 3, 6, 0],
    'encoder_segment_ids': [1, 1, 1, 2, 0],
    'encoder_positions': [0, 1, 2, 0, 0],
    # Each segment starts anew: the second example does not see 5.
    'tokens': [99, 4, 99, 7, 8, 0, 0],
    'targets': [4, 5, 7, 8, 9, 0, 0],
    'segment_ids': [1, 1, 2, 2, 2, 0, 0],
    'positions': [0, 1, 0, 1, 2, 0, 0],
    'loss_weights': [1, 1, 1, 1, 1, 0, 0],
  }
  assert not any(values[1].any() for values in batch.values())


def test_a_decoder_only_row():
  batch = DecoderLayout(9).assemble([ROW])
  assert as_lists({name: v[0] for name, v in batch.items()}) == {
    # The last target of an example is never an input.
    'tokens': [1, 2, 3, 4, 6, 7, 8, 0, 0],
    'targets': [2, 3, 4, 5, 7, 8, 9, 0, 0],
    'segment_ids': [1, 1, 1, 1, 2, 2, 2, 0, 0],
    'positions': [0, 1, 2, 3, 0, 1, 2, 0, 0],
    # Inputs have no loss; the first prediction with one is that of the first
    # target.
    'loss_weights': [0, 0, 1, 1, 1, 1, 1, 0, 0],
  }


@pytest.mark.parametrize(
  'layout',
  [EncoderDecoderLayout(3, 7, 99), EncoderDecoderLayout(5, 4, 99),
   DecoderLayout(6)],
)  # fmt: skip
def test_too_much_is_refused(layout):
  with pytest.raises(ValueError, match='do not fit'):
    layout.assemble([ROW])


def test_each_side_is_cut_to_its_own():
  cut = EncoderDecoderLayout(5, 7, 99).cut(np.array([9, 2]), np.array([3, 8]))
  assert (cut.inputs.tolist(), cut.targets.tolist()) == ([5, 2], [3, 7])


def test_a_decoders_row_keeps_half_for_the_inputs():
  layout = DecoderLayout(9)  # room for 10
  cut = layout.cut(np.array([9, 2, 20, 7, 4]), np.array([3, 30, 20, 4, 6]))
  assert cut.inputs.tolist() == [7, 2, 5, 6, 4]
  assert cut.targets.tolist() == [3, 8, 5, 4, 6]
  assert layout.fits(cut).all()
