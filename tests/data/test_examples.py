"""Rows have the examples that fit, and draws depend on the row alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.layouts import EncoderDecoderLayout, Example, Lengths
from moe_jax.data.packing import ExampleRows, packed


def test_by_hand():
  # Rows have room for 10 inputs and 5 targets. The first two examples fill a
  # row's inputs. The third does not fit by its targets. The fourth fits the
  # first row by targets but not by inputs, so that it goes to the second row.
  # The fifth fits only the first row.
  sizes = np.array([[6, 1], [4, 1], [2, 4], [5, 1], [0, 3]])
  assert packed(sizes, (10, 5)) == [[0, 1, 4], [2, 3]]


@settings(max_examples=40, deadline=None)
@given(
  st.lists(
    st.tuples(st.integers(1, 11), st.integers(1, 7)), min_size=1, max_size=60
  )
)
def test_every_example_is_in_one_row_and_fits(sizes):
  sizes = np.array(sizes)
  rows = packed(sizes, (11, 7))
  assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
  for row in rows:
    assert (sizes[row].sum(0) <= (11, 7)).all()


class Noisy(ExampleRows):
  """Examples i of i + 1 tokens i, with a random target."""

  def __init__(self, count=40, pack=True):
    n = np.arange(count) % 5 + 1
    lengths = Lengths(n, np.ones_like(n), n + 1)
    super().__init__(lengths, EncoderDecoderLayout(8, 4, 1), pack=pack)

  def example(self, index, generator):
    inputs = np.full(index % 5 + 1, index, np.int32)
    return Example(inputs, generator.integers(1000, 2**31, 1, np.int32))


def draw(rows, indices, seed, epochs):
  return rows.draw(np.array(indices), seed, np.array(epochs))


def test_noise_follows_seed_epoch_and_row_alone():
  rows = Noisy(pack=False)
  noise = {}
  for seed in (0, 1):
    for epoch in (0, 1):
      batch = draw(rows, [2, 7], seed, [epoch, epoch])
      for b, row in enumerate((2, 7)):
        noise[seed, epoch, row] = batch['targets'][b, 0]
  assert len(set(noise.values())) == 8
  # A row does not depend on the other rows drawn with it, or on their order.
  mixed = draw(rows, [7, 30, 2], 1, [0, 4, 1])
  assert mixed['targets'][0, 0] == noise[1, 0, 7]
  assert mixed['targets'][2, 0] == noise[1, 1, 2]


def test_an_evaluation_reads_the_same_at_every_call():
  rows = Noisy()
  batch, same_batch = (rows.take(np.array([3, 4])) for _ in range(2))
  for name in batch:
    np.testing.assert_array_equal(batch[name], same_batch[name])
  row = rows[3]
  for name in batch:
    np.testing.assert_array_equal(batch[name][0], row[name])


def test_rows_beyond_the_end_are_padding():
  rows = Noisy()
  batch = rows.take(np.array([len(rows) - 1, len(rows), len(rows) + 5]))
  assert batch['segment_ids'][0].any()
  for values in batch.values():
    assert len(values) == 3 and not values[1:].any()


def test_segments_of_both_sides_match():
  rows = Noisy()
  for r in range(len(rows)):
    row, members = rows[r], rows.members(r)
    for segment, i in enumerate(members, 1):
      inside = row['encoder_segment_ids'] == segment
      assert row['encoder_tokens'][inside].tolist() == [i] * (i % 5 + 1)
      assert (row['segment_ids'] == segment).sum() == 1
    assert row['segment_ids'].max() == len(members)


def test_unpacked_rows_have_one_example():
  rows = Noisy(pack=False)
  assert len(rows) == 40 > len(Noisy())
  assert [rows.members(r) for r in (0, 39)] == [[0], [39]]


def test_padding_is_counted():
  rows = Noisy(pack=False)
  # Examples have 1 to 5 of 8 inputs, and 1 of 4 targets.
  assert '40 rows of T_enc=8 and T_dec=4' in rows.describe()
  assert '62.5% of the encoder and 75.0% of the decoder' in rows.describe()
