"""The dictionary of ternary sequences against a heap, and by hand."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import ternary_dictionary
from tests import ternary_reference as reference


def sequence(words, length):
  """The weights of one code, from its two words."""
  bits = int(words[0]) | int(words[1]) << 28
  values = {0: 0, 1: 1, 3: -1}
  return tuple(
    values[bits >> 2 * shift & 3] for shift in reversed(range(int(length)))
  )


@functools.cache
def sequences(p0, size=ternary_dictionary.NUM_CODES):
  table = ternary_dictionary.dictionary(p0)
  return list(map(sequence, table.words.T[:size], table.lengths[:size]))


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


@pytest.mark.parametrize('p0', [0.885, 0.5, 0.99])
def test_it_is_what_a_heap_pops(p0):
  assert sequences(p0, 3000) == reference.dictionary(p0, 3000)


@pytest.mark.slow
@pytest.mark.parametrize('p0', [0.885, 0.5])
def test_all_of_it_is_what_a_heap_pops(p0):
  assert sequences(p0) == reference.dictionary(p0)


@pytest.mark.parametrize('p0', [0.885, 0.5])
def test_steps_add_a_pair_or_begin_anew(p0):
  numbered = {weights: c for c, weights in enumerate(sequences(p0))}
  table = ternary_dictionary.dictionary(p0)
  for code, weights in [*enumerate(sequences(p0))][::97]:
    for a in (0, 1, -1):
      for b in (0, 1, -1):
        number = 4 * (a & 3) + (b & 3)
        pair_code = numbered[a, b]
        assert table.pairs[number] == pair_code
        longer = numbered.get((*weights, a, b), pair_code)
        assert table.steps[code, number] == longer


@pytest.mark.parametrize('p0', [0.885, 0.34])
def test_codes_are_counted_in_32_bits_as_in_64(p0):
  # A kernel has 32 bits; small p0 have classes of many non-zeros, which are
  # larger than that.
  codes = jnp.arange(0, ternary_dictionary.NUM_CODES, 13, dtype=jnp.int32)
  last, first, lengths = ternary_dictionary.unrank(codes, p0, jnp.where)
  assert last.dtype == first.dtype == lengths.dtype == jnp.int32
  table = ternary_dictionary.dictionary(p0)
  np.testing.assert_array_equal([last, first], table.words[:, ::13])
  np.testing.assert_array_equal(lengths, table.lengths[::13])


@pytest.mark.parametrize(
  ('p0', 'message'),
  [
    (1.0, 'p0=1.0 must be above 0 and below 1'),
    (0.0001, 'p0=0.0001 is too small: the dictionary lacks a pair'),
  ],
)
def test_a_wrong_probability_is_refused(p0, message):
  with pytest.raises(ValueError, match=message):
    ternary_dictionary.dictionary(p0)
