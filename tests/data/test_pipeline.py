"""Batches are a function of their number, made by a thread that never hangs.

The oracle of the order is grain's own shuffle.
"""

import itertools
import threading
import time

import grain
import numpy as np
import pytest

from moe_jax.data import (
  DataError,
  PackedRows,
  batch_dataset,
  eval_batches,
  train_batches,
)
from moe_jax.data.pipeline import ahead

NUM_ROWS = 23  # with T=4 and B=6 no epoch ends with a batch


def numbered_rows(num_rows=NUM_ROWS, seq_len=4, cls=PackedRows):
  """Returns full rows; row r begins with the token r * seq_len."""
  tokens = np.arange(num_rows * seq_len + 1)
  return cls(tokens, np.array([0, 7 % num_rows]), seq_len)


def row_numbers(batch):
  return (batch['tokens'][:, 0] // 4).tolist()


def assert_equal(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize('num_rows', [1, 2, 2**16 + 1])
def test_the_order_is_that_of_grain(num_rows):
  # A seed and its neighbour have no epoch in common.
  seed = int(np.random.SeedSequence(5).generate_state(1)[0])
  order = grain.MapDataset.range(num_rows).shuffle(seed)
  # The tokens are numbers of rows, in epochs that cut the stream nowhere else.
  rows = PackedRows(np.arange(num_rows + 1), np.array([0]), 1)
  ds = batch_dataset(rows, batch_size=6, seed=5)
  for i in (0, 1, num_rows // 6, num_rows // 2, 2 * num_rows):
    expected = [order[row] for row in range(6 * i, 6 * i + 6)]
    assert ds[i]['tokens'][:, 0].tolist() == expected


def test_every_epoch_has_every_row_once_and_whole():
  rows = numbered_rows()
  ds = batch_dataset(rows, batch_size=6, seed=0)
  stream = [row for i in range(12) for row in row_numbers(ds[i])]
  epochs = [stream[e * NUM_ROWS : (e + 1) * NUM_ROWS] for e in range(3)]
  assert all(sorted(epoch) == [*range(NUM_ROWS)] for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert_equal(ds[2], rows.take(np.array(epochs[0][12:18])))


def test_later_epochs_cut_the_stream_elsewhere():
  rows = numbered_rows(seq_len=16)
  # An epoch has one batch.
  ds = batch_dataset(rows, batch_size=NUM_ROWS, seed=0)
  cuts = [set((ds[e]['tokens'][:, 0] % 16).tolist()) for e in range(6)]
  assert cuts[0] == {0}
  assert all(len(cut) == 1 for cut in cuts)  # one offset in each epoch
  assert len(set.union(*cuts)) > 2  # not the same in all
  # Row r of a later epoch begins where its row r - 1 ends; the last goes on at
  # the stream's beginning.
  (offset,) = cuts[1]
  batch = ds[1]
  assert batch['segment_ids'].all()
  for tokens in batch['tokens']:
    np.testing.assert_array_equal(
      tokens, (tokens[0] + np.arange(16)) % len(rows.tokens)
    )
    assert tokens[0] % 16 == offset


def test_a_stream_of_one_row_is_whole_in_every_epoch():
  rows = PackedRows(np.arange(5, 9), np.array([0]), 16)
  batch = batch_dataset(rows, batch_size=7, seed=0)[1]
  assert batch['tokens'][:, :3].tolist() == [[5, 6, 7]] * 7
  assert batch['loss_weights'].sum(1).tolist() == [3] * 7
  # 17 tokens are one row and its last target; one more is a second row.
  for count, is_cut in ((17, False), (18, True)):
    rows = PackedRows(np.arange(count), np.array([0]), 16)
    tokens = rows.draw(np.zeros(5, int), 0, np.arange(1, 6))['tokens']
    assert (tokens[:, 0] != 0).any() == is_cut


class CountingRows(PackedRows):
  """Rows that count how many of them have been read."""

  count = 0

  def take(self, indices, offsets=0):
    self.count += len(indices)
    return super().take(indices, offsets)


def test_rows_of_others_are_not_read():
  rows = numbered_rows(cls=CountingRows)
  batch_dataset(rows, batch_size=6, seed=3, share=np.array([1, 4]))[7]
  list(eval_batches(rows, batch_size=6, num_batches=2, share=np.array([5])))
  assert rows.count == 2 + 2


def test_training_begins_anywhere_even_within_a_batch():
  rows = numbered_rows()
  arguments = dict(batch_size=6, seed=2, share=np.array([4, 1]))
  ds = batch_dataset(rows, batch_size=1, seed=2)
  stream = train_batches(rows, start=7, offset=-5, **arguments)
  for i, batch in enumerate(itertools.islice(stream, 9), 7):
    singles = [ds[6 * i - 5 + b] for b in (4, 1)]
    assert_equal(
      batch, {k: np.concatenate([s[k] for s in singles]) for k in batch}
    )


class FailingRows(PackedRows):
  """Rows that cannot be read."""

  def take(self, indices, offsets=0):
    raise OSError('disk gone')


def test_errors_name_the_batch():
  rows = numbered_rows(cls=FailingRows)
  with pytest.raises(DataError, match=r'batch 3 .*OSError: disk gone'):
    next(train_batches(rows, batch_size=6, seed=0, start=3))
  with pytest.raises(DataError, match=r'batch 0 .*OSError: disk gone'):
    next(eval_batches(rows, batch_size=6))
  with pytest.raises(ValueError, match='batch -1 would begin with row -6'):
    train_batches(rows, batch_size=6, seed=0, start=-1)
  with pytest.raises(ValueError, match='0 rows'):
    batch_dataset(PackedRows(np.arange(1), [0], 4), batch_size=6, seed=0)


def test_evaluation_sees_every_row_once_and_padding_last():
  rows = numbered_rows()
  batches = list(eval_batches(rows, batch_size=6))
  numbers = [n for batch in batches for n in row_numbers(batch)]
  assert numbers == [*range(NUM_ROWS), 0]
  assert len(batches) == 4
  assert not any(values[5].any() for values in batches[3].values())
  # Processes share a batch.
  share = np.array([2, 5])
  parts = eval_batches(rows, batch_size=6, share=share)
  for whole, part in zip(batches, parts, strict=True):
    assert_equal(part, {name: values[share] for name, values in whole.items()})


@pytest.mark.parametrize(
  ('num_batches', 'first_rows'),
  [(1, [0]), (3, [0, 6, 12]), (9, [0, 6, 12, 18])],
)
def test_some_batches_are_spread_evenly(num_batches, first_rows):
  batches = eval_batches(numbered_rows(), batch_size=6, num_batches=num_batches)
  assert [row_numbers(b)[0] for b in batches] == first_rows


# The thread that makes batches in advance follows.


def threads():
  return {t for t in threading.enumerate() if t.name == 'batches'}


@pytest.fixture
def others():
  """Threads of other tests' streams that have not been collected yet."""
  return threads()


def wait_for_end(others):
  deadline = time.monotonic() + 20
  while threads() - others:
    assert time.monotonic() < deadline, 'the thread goes on'
    time.sleep(0.01)


def test_elements_come_in_order_and_a_few_ahead(others):
  elements = []

  def source():
    for i in range(9):
      elements.append(i)
      yield i

  stream = ahead(source(), first=0, most=2)
  assert not elements
  assert next(stream) == 0
  time.sleep(0.2)
  # At most two elements wait in the queue, and the thread holds another.
  assert 1 < len(elements) <= 4
  assert [0, *stream] == list(range(9))
  wait_for_end(others)


@pytest.mark.parametrize(
  ('error', 'text'),
  [
    (KeyError('row 7'), "KeyError: 'row 7'"),
    (SystemExit(3), 'SystemExit: 3'),  # would end a thread silently
  ],
)
def test_whatever_ends_the_thread_is_an_error_and_no_hang(error, text):
  def source():
    yield from range(3)
    raise error

  stream = ahead(source(), first=5, most=4)
  assert list(itertools.islice(stream, 3)) == [0, 1, 2]
  with pytest.raises(DataError, match='batch 8 could not be made') as caught:
    next(stream)
  assert str(caught.value).endswith(text)
  assert caught.value.__cause__ is error
  with pytest.raises(StopIteration):  # not the batch after the lost one
    next(stream)


def test_a_stream_that_is_given_up_ends_its_thread(others):
  stream = ahead(itertools.count(), first=0, most=1)
  assert next(stream) == 0
  assert threads() - others
  stream.close()
  wait_for_end(others)
