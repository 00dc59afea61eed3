"""Rows of documents and of examples, by hand and against a plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.layouts import EncoderDecoderLayout, Example, Lengths
from moe_jax.data.packing import ExampleRows, PackedRows, packed


def pack(documents, seq_len):
  lengths = [len(document) for document in documents]
  starts = np.cumsum([0, *lengths[:-1]])
  return PackedRows(np.concatenate(documents), starts, seq_len)


def as_lists(row):
  return {name: values.tolist() for name, values in row.items()}


# Documents 'a b .' and 'c d e f g .' (9 ends one) make the stream
# 1 2 9 3 4 5 6 7 9, cut every 4: the second row goes on in the second document
# and its targets reach the 9; nothing is left for a third row.
DOCUMENTS = [
  np.array([1, 2, 9], np.uint16),
  np.array([3, 4, 5, 6, 7, 9], np.uint16),
]


def test_a_boundary_inside_a_row():
  rows = pack(DOCUMENTS, 4)
  assert len(rows) == 2
  assert as_lists(rows[0]) == {
    'tokens': [1, 2, 9, 3],
    'targets': [2, 9, 3, 4],
    'segment_ids': [1, 1, 1, 2],
    'positions': [0, 1, 2, 0],
    # The 9 ends the first document: the prediction of the next document's 3 has
    # no loss.
    'loss_weights': [1, 1, 0, 1],
  }
  assert as_lists(rows[1]) == {
    'tokens': [4, 5, 6, 7],
    'targets': [5, 6, 7, 9],
    'segment_ids': [1, 1, 1, 1],  # numbered within the row
    'positions': [0, 1, 2, 3],  # and counted within the row
    'loss_weights': [1, 1, 1, 1],
  }


def test_rows_outside_are_refused():
  rows = pack(DOCUMENTS, 4)
  for outside in (2, -3):
    with pytest.raises(IndexError, match='of 2'):
      rows[outside]


def oracle(documents, seq_len, offset):
  """Makes the rows token by token, by definition; a row is a dict of lists.

  The stream is read in a circle from the offset; the end of the stream ends a
  document, too.
  """
  stream = [(d, t) for d, doc in enumerate(documents) for t in doc]
  stream = stream[offset:] + [(d + 99, t) for d, t in stream[:offset]]
  rows = []
  for begin in range(0, len(stream) - 1, seq_len):
    row = {name: [] for name in pack(DOCUMENTS, 4)[0]}
    for i in range(begin, begin + seq_len):
      document, token = stream[i] if i < len(stream) else (None, 0)
      next_doc, target = stream[i + 1] if i + 1 < len(stream) else (None, 0)
      row_documents = [d for d, _ in stream[begin : min(i, len(stream)) + 1]]
      real = document is not None
      row['tokens'].append(token)
      row['targets'].append(target)
      row['segment_ids'].append(len(set(row_documents)) if real else 0)
      row['positions'].append(row_documents.count(document) - 1 if real else 0)
      row['loss_weights'].append(float(real and document == next_doc))
    rows.append(row)
  return rows


@settings(max_examples=80, deadline=None)
@given(
  documents=st.lists(
    st.lists(st.integers(1, 300), min_size=1, max_size=9),
    min_size=1,
    max_size=7,
  ),
  seq_len=st.integers(1, 11),
  offset=st.integers(0, 10),
)
def test_packing_equals_the_loop(documents, seq_len, offset):
  offset %= min(seq_len, sum(map(len, documents)))
  rows = pack([np.array(d, np.uint16) for d in documents], seq_len)
  batch = rows.take(np.arange(len(rows)), offset)
  expected = oracle(documents, seq_len, offset)
  assert as_lists(batch) == {k: [row[k] for row in expected] for k in batch}
  if not offset:
    assert [as_lists(row) for row in rows] == expected


# Rows of examples follow.


def test_examples_go_into_the_first_row_where_they_fit():
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


def test_unpacked_rows_have_one_example():
  rows = Noisy(pack=False)
  assert len(rows) == 40 > len(Noisy())
  assert [rows.members(r) for r in (0, 39)] == [[0], [39]]
  # Examples have 1 to 5 of 8 inputs, and 1 of 4 targets.
  text = '62.5% of the encoder and 75.0% of the decoder'
  assert text in rows.describe()
