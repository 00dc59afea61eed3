"""Tokens in several files are read as one array."""

import numpy as np
import pytest

from moe_jax.data.packing import PackedRows
from moe_jax.data.store import Shards


@pytest.fixture
def array_and_shards(tmp_path):
  """An array, and shards of the same array in four files."""
  whole = np.random.default_rng(0).integers(0, 999, 100).astype(np.uint16)
  counts = [7, 60, 1, 32]
  paths = [tmp_path / f'{i}.tokens' for i in range(4)]
  for path, part in zip(paths, np.split(whole, np.cumsum(counts)[:-1])):
    part.tofile(path)
  return whole, Shards(paths, 'uint16', counts)


def test_indexing_is_that_of_an_array(array_and_shards):
  whole, shards = array_and_shards
  assert (len(shards), shards.shape, shards.dtype) == (100, (100,), np.uint16)
  rng = np.random.default_rng(1)
  for index in (
    3,
    np.int64(67),
    rng.integers(0, 100, 50),
    rng.integers(0, 100, (5, 4, 3)),
    np.zeros(0, np.int64),
    np.zeros((2, 0), np.int64),
    *(slice(*np.sort(rng.integers(0, 101, 2)).tolist()) for _ in range(40)),
    slice(60, 20),
    slice(-5, None),
  ):
    np.testing.assert_array_equal(shards[index], whole[index])
    assert shards[index].dtype == np.uint16
  for index in (100, -1, np.array([3, 100]), slice(None, None, 2)):
    with pytest.raises(IndexError):
      shards[index]


def test_rows_cross_files(array_and_shards):
  whole, shards = array_and_shards
  starts = np.array([0, 5, 66, 67, 68, 90])
  rows = np.array([13, 0, 9, 4, 20])  # 13 goes on in the first file
  batch = PackedRows(shards, starts, 7).take(rows, offsets=3)
  for name, values in (
    PackedRows(whole, starts, 7).take(rows, offsets=3).items()
  ):
    np.testing.assert_array_equal(batch[name], values)


def test_a_file_is_opened_when_it_is_read(array_and_shards, tmp_path):
  _, shards = array_and_shards
  (tmp_path / '2.tokens').write_bytes(b'')
  assert len(shards[:67]) == 67
  with pytest.raises(ValueError, match=r'2\.tokens is missing or not of its 2'):
    shards[67]
