"""Ternary matrices in codes: the dictionary, and encoding without loss."""

import functools

import numpy as np
import pytest

from moe_jax.kernels import ternary
from tests import ternary_reference as reference


@functools.cache
def sequences(p0, size=ternary.NUM_CODES):
  table = ternary.dictionary(p0)
  rows = zip(table.weights[:size].tolist(), table.lengths[:size], strict=True)
  return [tuple(row[-length:]) for row, length in rows]


def test_the_first_codes_by_hand():
  # A zero has probability 0.885, and 1 and -1 have 0.0575 each.
  first = sequences(0.885, 26)
  # 0.885^24 = 0.0533 for twelve pairs of zeros; the shorter are more probable.
  assert first[:12] == [(0,) * n for n in range(2, 25, 2)]
  # 0.885 * 0.0575 = 0.0509.
  assert first[12:16] == [(0, 1), (0, -1), (1, 0), (-1, 0)]
  assert first[16] == (0,) * 26  # 0.885^26 = 0.0417
  # 0.885^3 * 0.0575 = 0.0399.
  assert first[17:20] == [(0, 0, 0, 1), (0, 0, 0, -1), (0, 0, 1, 0)]
  assert first[24:] == [(-1, 0, 0, 0), (0,) * 28]  # 0.885^28 = 0.0327


@pytest.mark.parametrize('p0', [0.885, 0.5])
def test_it_is_what_a_heap_pops(p0):
  assert sequences(p0, 3000) == reference.dictionary(p0, 3000)


def test_steps_add_a_pair_or_begin_anew():
  p0 = 0.885
  numbered = {weights: c for c, weights in enumerate(sequences(p0))}
  table = ternary.dictionary(p0)
  for code, weights in [*enumerate(sequences(p0))][::97]:
    for a in (0, 1, -1):
      for b in (0, 1, -1):
        number = 4 * (a & 3) + (b & 3)
        pair_code = numbered[a, b]
        assert table.pairs[number] == pair_code
        longer = numbered.get((*weights, a, b), pair_code)
        assert table.steps[code, number] == longer


def test_codes_by_hand():
  # Code 0 is a pair of zeros and code 1 two of them; codes 17 to 24 have one
  # other weight among four: in the last place as 1 and as -1, and so on
  # (`test_the_first_codes_by_hand`).
  weights = np.array(
    [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 0]], np.int8
  )
  codes = ternary.encode(weights)
  np.testing.assert_array_equal(codes.codes, [17, 1, 20, 24])
  np.testing.assert_array_equal(codes.offsets, [0, 1, 2, 3, 4])
  # Code 25 is 28 zeros, the most that a code has; a row of odd width has a zero
  # more than it shows. An expert with fewer codes is filled with 0.
  experts = np.stack([np.zeros((1, 31), np.int8), np.ones((1, 31), np.int8)])
  codes = ternary.encode(experts)
  max_codes = codes.codes.shape[1]
  assert codes.codes[0].tolist() == [25, 1] + [0] * (max_codes - 2)
  assert codes.offsets.tolist() == [[0, 2], [0, max_codes]] and max_codes > 2


def test_each_code_is_the_longest_that_fits():
  code_of = {weights: c for c, weights in enumerate(sequences(0.885))}
  weights = reference.random(0.8, 20, 151)
  codes = ternary.encode(weights)
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
    reference.random(0.6, ternary.ROWS + 1, 3),
  ],
)
def test_decoded_weights_are_those_encoded(weights):
  codes = ternary.encode(weights)
  decoded = ternary.decode(codes, weights.shape[-1])
  np.testing.assert_array_equal(decoded, weights)


def test_a_weight_that_has_no_code_is_refused():
  with pytest.raises(ValueError, match='weight -128 is not one of -1, 0, 1'):
    ternary.encode(np.full((2, 3), -128, np.int8))
