"""Ternary matrices in codes: by hand, and without loss."""

import re

import numpy as np
import pytest

from moe_jax.compression import codec
from moe_jax.kernels import ternary
from tests import ternary_reference as reference
from tests.kernels.test_ternary import sequences


def test_codes_by_hand():
  # Code 0 is a pair of zeros and code 1 two of them; codes 17 to 24 have one
  # other weight among four: in the last place as 1 and as -1, and so on
  # (`test_ternary.py`).
  weights = np.array(
    [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 0]], np.int8
  )
  codes = codec.encode(weights)
  np.testing.assert_array_equal(codes.codes, [17, 1, 20, 24])
  np.testing.assert_array_equal(codes.offsets, [0, 1, 2, 3, 4])
  # Code 25 is 28 zeros, the most that a code has; a row of odd width has a zero
  # more than it shows. An expert with fewer codes is filled with 0.
  experts = np.stack([np.zeros((1, 31), np.int8), np.ones((1, 31), np.int8)])
  codes = codec.encode(experts)
  max_codes = codes.codes.shape[1]
  assert codes.codes[0].tolist() == [25, 1] + [0] * (max_codes - 2)
  assert codes.offsets.tolist() == [[0, 2], [0, max_codes]] and max_codes > 2


def test_each_code_is_the_longest_that_fits():
  code_of = {weights: c for c, weights in enumerate(sequences(0.885))}
  weights = reference.random(0.8, 20, 151)
  codes = codec.encode(weights)
  rows = [reference.greedy(row, code_of) for row in weights]
  np.testing.assert_array_equal(codes.codes, np.concatenate(rows))
  np.testing.assert_array_equal(np.diff(codes.offsets), list(map(len, rows)))


@pytest.mark.parametrize(
  'weights',
  [
    reference.random(0.885, 3, 2, 5, 7),
    reference.random(0.2, 5, 200),
    np.zeros((3, 64), np.int8),
    -np.ones((4, 9), np.int8),
    np.ones((1, 1), np.int8),
    reference.random(0.885, 1, 333),
  ],
  ids=['experts', 'dense', 'zeros', 'minus_ones', 'one_weight', 'one_row'],
)
def test_decoded_weights_are_those_encoded(weights):
  codes = codec.encode(weights)
  decoded = ternary.decode(codes, weights.shape[-1])
  np.testing.assert_array_equal(decoded, weights)


@pytest.mark.parametrize('rows', [codec.ROWS - 1, codec.ROWS, codec.ROWS + 1])
def test_blocks_of_rows_follow_each_other(rows):
  weights = reference.random(0.6, rows, 3)
  codes = codec.encode(weights)
  np.testing.assert_array_equal(ternary.decode(codes, 3), weights)


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    (np.zeros((2, 3)), 'float64[2, 3] must be int8'),
    (np.zeros(3, np.int8), 'int8[3] must be int8 [..., rows, width]'),
    (np.zeros((0, 3), np.int8), 'at least one weight'),
    (np.full((2, 3), 2, np.int8), 'weight 2 is not one of -1, 0, 1'),
    (np.full((2, 3), -128, np.int8), 'weight -128 is not one of -1, 0, 1'),
  ],
)
def test_wrong_weights_are_refused(weights, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    codec.encode(weights)
