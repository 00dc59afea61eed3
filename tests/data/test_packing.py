"""Rows of packed documents, by hand and against a plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.packing import PackedRows


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


def test_the_last_row_is_padded():
  rows = pack([*DOCUMENTS, np.array([8, 9], np.uint16)], 4)
  assert len(rows) == 3
  # The stream ends with 9, which is an input without a target.
  assert as_lists(rows[2]) == {
    'tokens': [9, 8, 9, 0],
    'targets': [8, 9, 0, 0],
    'segment_ids': [1, 2, 2, 0],
    'positions': [0, 0, 1, 0],
    'loss_weights': [0, 1, 0, 0],
  }


def test_a_document_that_ends_with_its_row():
  rows = pack([np.array([1, 2, 3, 9]), np.array([4, 5, 9])], 4)
  assert as_lists(rows[0])['loss_weights'] == [1, 1, 1, 0]
  assert as_lists(rows[0])['targets'] == [2, 3, 9, 4]
  assert as_lists(rows[1])['positions'] == [0, 1, 2, 0]


def test_dtypes_and_indices():
  rows = pack(DOCUMENTS, 4)
  dtypes = {name: values.dtype.name for name, values in rows[0].items()}
  assert dtypes.pop('loss_weights') == 'float32'
  assert set(dtypes.values()) == {'int32'}
  assert as_lists(rows[-1]) == as_lists(rows[1])
  for outside in (2, -3):
    with pytest.raises(IndexError, match='of 2'):
      rows[outside]


def test_rows_beyond_the_end_are_padding():
  batch = pack(DOCUMENTS, 4).take(np.array([0, 2, 5]))
  for values in batch.values():
    assert values.shape == (3, 4)
    assert values[0].any()
    assert not values[1:].any()


def oracle(documents, seq_len):
  """Makes the rows token by token, by definition; a row is a dict of lists."""
  stream = [(d, t) for d, doc in enumerate(documents) for t in doc]
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


@settings(max_examples=40, deadline=None)
@given(
  documents=st.lists(
    st.lists(st.integers(1, 300), min_size=1, max_size=9),
    min_size=1,
    max_size=7,
  ),
  seq_len=st.integers(1, 11),
)
def test_packing_equals_the_loop(documents, seq_len):
  rows = pack([np.array(d, np.uint16) for d in documents], seq_len)
  assert [as_lists(row) for row in rows] == oracle(documents, seq_len)


def test_an_offset_reads_round_to_what_is_before_it():
  # Documents '10 11 12 13' and '14 15 16 17 18', cut at the 12.
  rows = PackedRows(np.arange(10, 19), np.array([0, 4]), 5)
  batch = rows.take(np.arange(2), 2)
  assert as_lists({k: v[0] for k, v in batch.items()}) == {
    'tokens': [12, 13, 14, 15, 16],
    'targets': [13, 14, 15, 16, 17],
    'segment_ids': [1, 1, 2, 2, 2],
    'positions': [0, 1, 0, 1, 2],
    'loss_weights': [1, 0, 1, 1, 1],
  }
  # The first document is seen as two parts, and 18 does not predict the 10.
  assert as_lists({k: v[1] for k, v in batch.items()}) == {
    'tokens': [17, 18, 10, 11, 0],
    'targets': [18, 10, 11, 0, 0],
    'segment_ids': [1, 1, 2, 2, 0],
    'positions': [0, 1, 0, 1, 0],
    'loss_weights': [1, 0, 1, 0, 0],
  }


@settings(max_examples=80, deadline=None)
@given(
  lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
  seq_len=st.integers(1, 11),
  data=st.data(),
)
def test_an_epoch_has_all_predictions_but_one(lengths, seq_len, data):
  # A token's number is its place in the stream.
  stream = np.arange(sum(lengths))
  documents = np.split(stream, np.cumsum(lengths)[:-1])
  rows = pack(documents, seq_len)
  offset = data.draw(st.integers(0, seq_len - 1))
  batch = rows.take(np.arange(len(rows)), offset)
  found = []
  for b, t in np.argwhere(batch['loss_weights']):
    tokens, segments = batch['tokens'][b], batch['segment_ids'][b]
    context = tokens[: t + 1][segments[: t + 1] == segments[t]].tolist()
    # A segment is one stretch of a document, counted from its first token.
    assert batch['positions'][b, t] == len(context) - 1
    assert context == [*range(context[0], context[0] + len(context))]
    found.append((context[-1], int(batch['targets'][b, t])))
  lost = (offset - 1) % len(stream)
  pairs = [(a, a + 1) for d in documents for a in d[:-1].tolist() if a != lost]
  assert sorted(found) == pairs
  assert batch['segment_ids'][:-1].all()  # only the last row has padding
