"""Rows of several sources come in an exact order, the same for everyone."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.data import PackedRows, batch_dataset
from moe_jax.data.mixing import MixedRows, Schedule, whole_counts

T = 4
# Small sizes would be slow, as grain draws until a number is in range.
SIZES = {'a': 70, 'b': 50, 'c': 30}
COUNTS = np.array([3, 2, 1])


def rows_of(name, size):
  """Returns rows that begin with a token that names their source and number."""
  first = 1000 * (1 + 'abcd'.index(name))
  tokens = first + np.arange(size * T + 1)
  return PackedRows(tokens, np.array([0]), T)


def mixed_rows(sizes=SIZES, counts=COUNTS):
  rows_by_source = {name: rows_of(name, size) for name, size in sizes.items()}
  return MixedRows(rows_by_source, Schedule(counts))


def origins(batch):
  """Returns source and row number of each row of a batch of the first epoch."""
  first = batch['tokens'][:, 0]
  return [('abcd'[t // 1000 - 1], t % 1000 // T) for t in first.tolist()]


def test_a_told_schedule():
  # Three of four rows are of source 0. The row of source 1 may come once half
  # of it has come up, 1 / (2n - 2), and comes in the middle of a period.
  schedule = Schedule(np.array([3, 1]))
  part, number = schedule(np.arange(8))
  assert part.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
  assert number.tolist() == [0, 1, 0, 2, 3, 4, 1, 5]
  # Any row is found alone.
  part, number = schedule(np.array([4 * 10**12 + 2]))
  assert (part.tolist(), number.tolist()) == ([1], [10**12])


@pytest.mark.parametrize(
  ('weights', 'period', 'counts'),
  [
    ([3.0, 1.0], 4, [3, 1]),
    ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
    # The remainders of 3.33 each are equal, and the first gets the row.
    ([1.0, 1.0, 1.0], 10, [4, 3, 3]),
    # 6.6, 2.2, 1.1: the largest remainder is the first's.
    ([6.0, 2.0, 1.0], 10, [7, 2, 1]),
    ([1.0, 0.0], 3, [3, 0]),
  ],
)
def test_largest_remainders(weights, period, counts):
  row_counts = whole_counts(dict(zip('abc', weights)), period)
  assert row_counts == dict(zip('abc', counts))


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    ([100.0, 1.0], r"period=10 has no row of 1 sources .* 'b' .* 0.0099"),
    ([2.0, -1.0], r"weights=\{'a': 2.0, 'b': -1.0\} must each be at least 0"),
    ([0.0, 0.0], 'one of them above 0'),
  ],
)
def test_weights_that_no_period_can_have(weights, message):
  with pytest.raises(ValueError, match=message):
    whole_counts(dict(zip('ab', weights)), 10)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 50))
@example([1, 1, 1, 5], 0)
def test_weights_are_met_exactly_over_every_period(counts, period):
  schedule, length = Schedule(np.array(counts)), sum(counts)
  part, number = schedule(np.arange(period * length, (period + 1) * length))
  assert np.bincount(part, minlength=len(counts)).tolist() == counts
  for p, count in enumerate(counts):
    # No row of a source is left out or taken twice.
    expected = np.arange(period * count, (period + 1) * count)
    np.testing.assert_array_equal(number[part == p], expected)
    # Rows are spread evenly: no prefix is a whole row from its share.
    num_rows_so_far = np.cumsum(part == p)
    share = np.arange(1, length + 1) * count / length
    n = max(len(counts), 2)
    assert np.abs(num_rows_so_far - share).max() <= 1 - 1 / (2 * n - 2) + 1e-9


def test_a_batch_has_the_rows_that_the_schedule_says():
  batches = batch_dataset(mixed_rows(), batch_size=6, seed=0)
  assert [name for name, _ in origins(batches[0])] == list('abacba')
  stream = [row for i in range(25) for row in origins(batches[i])]
  # Each row of a source comes once in its first epoch, in its own order.
  of_b = [row for name, row in stream if name == 'b']
  assert sorted(of_b[:50]) == list(range(50))
  of_a = [row for name, row in stream if name == 'a']
  assert sorted(of_a[:70]) == list(range(70)) and of_a[:70] != list(range(70))


def test_a_source_has_an_order_of_its_own():
  def first_rows_of_b(rows):
    batches = batch_dataset(rows, batch_size=12, seed=4)
    return [row for name, row in origins(batches[0]) if name == 'b'][:3]

  mixture_of_two = mixed_rows({'b': 50, 'd': 90}, np.array([1, 2]))
  assert first_rows_of_b(mixed_rows()) == first_rows_of_b(mixture_of_two)


def test_processes_share_a_batch_of_any_number():
  whole = batch_dataset(mixed_rows(), batch_size=8, seed=3)
  share = np.array([1, 6, 7])
  part = batch_dataset(mixed_rows(), batch_size=8, seed=3, share=share)
  for i in (0, 20, 10**9):
    for name, values in whole[i].items():
      np.testing.assert_array_equal(part[i][name], values[share])


def test_an_evaluation_has_every_row_once():
  rows = mixed_rows()
  assert len(rows) == 150
  batch = rows.take(np.arange(151))
  expected = [(n, r) for n, size in SIZES.items() for r in range(size)]
  assert origins({'tokens': batch['tokens'][:150]}) == expected
  assert not batch['segment_ids'][150].any()  # beyond the last is padding


def test_a_source_without_rows_is_named():
  rows = MixedRows(
    {'a': rows_of('a', 2), 'b': PackedRows(np.arange(1), np.array([0]), T)},
    Schedule(np.array([1, 1])),
  )
  with pytest.raises(ValueError, match="0 rows of source 'b'"):
    batch_dataset(rows, batch_size=2, seed=0)
