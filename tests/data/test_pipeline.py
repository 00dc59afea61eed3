"""Batches are a function of their number, for any number of processes."""

import collections
import itertools

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

NUM_ROWS = 23  # with T=4 and B=6 no epoch ends with a batch


def numbered_rows(num_rows=NUM_ROWS, seq_len=4):
  """Returns full rows; row r begins with the token r * seq_len."""
  tokens = np.arange(num_rows * seq_len + 1)
  return PackedRows(tokens, np.array([0, 7]), seq_len)


def row_numbers(batch):
  return (batch['tokens'][:, 0] // 4).tolist()


def assert_equal(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def test_every_epoch_has_every_row_once_in_its_own_order():
  ds = batch_dataset(numbered_rows(), batch_size=6, seed=0)
  stream = [row for i in range(12) for row in row_numbers(ds[i])]
  epochs = [stream[e * NUM_ROWS : (e + 1) * NUM_ROWS] for e in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(NUM_ROWS))
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize('num_rows', [1, 2, NUM_ROWS, 2**16 + 1])
def test_the_order_is_that_of_grain(num_rows):
  seed = int(np.random.SeedSequence(5).generate_state(1)[0])
  order = grain.MapDataset.range(num_rows).shuffle(seed)
  # The tokens are numbers of rows, in epochs that cut the stream nowhere else.
  rows = PackedRows(np.arange(num_rows + 1), np.array([0]), 1)
  ds = batch_dataset(rows, batch_size=6, seed=5)
  for i in (0, 1, num_rows // 6, num_rows // 2, 2 * num_rows):
    assert ds[i]['tokens'][:, 0].tolist() == [
      order[row] for row in range(6 * i, 6 * i + 6)
    ]


def test_rows_arrive_whole():
  rows = numbered_rows()
  batch = batch_dataset(rows, batch_size=6, seed=1)[2]
  for b, row in enumerate(row_numbers(batch)):
    assert_equal({k: v[b] for k, v in batch.items()}, rows[row])


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


def test_a_batch_depends_on_its_number_and_the_seed_alone():
  def make_dataset(seed):
    return batch_dataset(numbered_rows(), batch_size=6, seed=seed)

  forwards = [make_dataset(5)[i] for i in range(9)]
  dataset = make_dataset(5)
  for i in reversed(range(9)):
    assert_equal(dataset[i], forwards[i])
  assert row_numbers(make_dataset(6)[0]) != row_numbers(forwards[0])


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


def test_neighbouring_seeds_share_no_epoch():
  # A batch of all rows is an epoch.
  orders = [
    tuple(
      row_numbers(
        batch_dataset(numbered_rows(), batch_size=NUM_ROWS, seed=s)[e]
      )
    )
    for s in range(3)
    for e in range(3)
  ]
  assert len(set(orders)) == 9


# These are the shares of processes, whose devices can be neighbours or
# interleaved; two processes can also have the same row.
SHARES = [[[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]], [[0, 3], [0, 3, 5]]]


@pytest.mark.parametrize('shares', SHARES)
def test_a_batch_does_not_depend_on_who_takes_it(shares):
  rows = numbered_rows()
  whole = batch_dataset(rows, batch_size=6, seed=3)
  for share in map(np.array, shares):
    part = batch_dataset(rows, batch_size=6, seed=3, share=share)
    for i in (0, 3, 4, 50):
      assert_equal(part[i], {k: v[share] for k, v in whole[i].items()})


class CountingRows(PackedRows):
  """Rows that count how many of them have been read."""

  count = 0

  def take(self, indices, offsets=0):
    self.count += len(indices)
    return super().take(indices, offsets)


def test_rows_of_others_are_not_read():
  all_rows = numbered_rows()
  rows = CountingRows(all_rows.tokens, all_rows.starts, all_rows.seq_len)
  batch_dataset(rows, batch_size=6, seed=3, share=np.array([1, 4]))[7]
  list(eval_batches(rows, batch_size=6, num_batches=2, share=np.array([5])))
  assert rows.count == 2 + 2


@pytest.mark.parametrize('start', [0, 1, 7])
def test_training_begins_anywhere(start):
  rows = numbered_rows()
  ds = batch_dataset(rows, batch_size=6, seed=2)
  stream = train_batches(rows, batch_size=6, seed=2, start=start)
  for i, batch in enumerate(itertools.islice(stream, 12)):
    assert_equal(batch, ds[start + i])


def test_training_begins_anywhere_in_a_process():
  share = {'share': np.array([1, 2])}
  rows = numbered_rows()
  ds = batch_dataset(rows, batch_size=6, seed=2, **share)
  stream = train_batches(rows, batch_size=6, seed=2, start=5, **share)
  assert_equal(next(stream), ds[5])
  assert_equal(next(stream), ds[6])


def test_fewer_rows_than_a_batch():
  batch = batch_dataset(numbered_rows(2), batch_size=7, seed=0)[0]
  counts = collections.Counter(row_numbers(batch))
  assert counts.keys() == {0, 1} and counts.total() == 7
  assert abs(counts[0] - counts[1]) == 1


class FailingRows(PackedRows):
  """Rows that cannot read the row that begins with token 0."""

  def take(self, indices, offsets=0):
    if 0 in indices:
      raise OSError('disk gone')
    return super().take(indices, offsets)


def test_a_background_error_is_raised_and_ends_the_stream():
  all_rows = numbered_rows()
  rows = FailingRows(all_rows.tokens, all_rows.starts, all_rows.seq_len)
  num_good = next(
    i
    for i, batch in enumerate(
      train_batches(all_rows, batch_size=6, seed=0, start=0)
    )
    if 0 in row_numbers(batch)
  )
  stream = train_batches(rows, batch_size=6, seed=0, start=0)
  assert len(list(itertools.islice(stream, num_good))) == num_good
  with pytest.raises(DataError, match=f'batch {num_good} .*OSError: disk gone'):
    next(stream)
  with pytest.raises(StopIteration):  # not the batch after the lost one
    next(stream)
  with pytest.raises(DataError, match=r'batch 0 .*OSError: disk gone'):
    next(eval_batches(rows, batch_size=6))


def test_evaluation_sees_every_row_once_and_padding_last():
  rows = numbered_rows()
  batches = list(eval_batches(rows, batch_size=6))
  assert [row_numbers(b) for b in batches[:3]] == [
    list(range(6)),
    list(range(6, 12)),
    list(range(12, 18)),
  ]
  assert len(batches) == 4
  assert row_numbers(batches[3])[:5] == [18, 19, 20, 21, 22]
  assert {b['tokens'].shape for b in batches} == {(6, 4)}
  for values in batches[3].values():
    assert not values[5].any()
  total = sum(b['loss_weights'].sum() for b in batches)
  assert total == sum(row['loss_weights'].sum() for row in rows)


@pytest.mark.parametrize(
  ('num_batches', 'first_rows'),
  [(1, [0]), (2, [0, 12]), (3, [0, 6, 12]), (9, [0, 6, 12, 18])],
)
def test_some_batches_are_spread_evenly(num_batches, first_rows):
  batches = eval_batches(numbered_rows(), batch_size=6, num_batches=num_batches)
  assert [row_numbers(b)[0] for b in batches] == first_rows


def test_processes_share_an_evaluation():
  rows = numbered_rows()
  streams = [
    eval_batches(rows, batch_size=6, share=np.arange(2 * p, 2 * p + 2))
    for p in range(3)
  ]
  for whole, *shares in zip(eval_batches(rows, batch_size=6), *streams):
    joined = {n: np.concatenate([s[n] for s in shares]) for n in whole}
    assert_equal(joined, whole)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'seed': -1}, 'non-negative'),
    ({'start': -1}, 'batch -1 would begin with row -6'),
  ],
)
def test_wrong_arguments_are_refused_at_once(wrong, message):
  arguments = {'batch_size': 6, 'seed': 0, 'start': 0} | wrong
  with pytest.raises(ValueError, match=message):
    train_batches(numbered_rows(), **arguments)


def test_no_rows_are_refused():
  rows = PackedRows(np.arange(1), np.array([0]), 4)
  with pytest.raises(ValueError, match='0 rows'):
    batch_dataset(rows, batch_size=6, seed=0)
