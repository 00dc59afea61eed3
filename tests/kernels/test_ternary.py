"""The dictionary of ternary sequences against a heap, and by hand."""

import functools

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
  table = ternary.dictionary(p0)
  for code, weights in [*enumerate(sequences(p0))][::97]:
    for a in (0, 1, -1):
      for b in (0, 1, -1):
        number = 4 * (a & 3) + (b & 3)
        pair_code = numbered[a, b]
        assert table.pairs[number] == pair_code
        longer = numbered.get((*weights, a, b), pair_code)
        assert table.steps[code, number] == longer
