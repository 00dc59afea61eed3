"""Denoised windows of a stream, through the whole pipeline."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import batch_dataset, eval_batches
from moe_jax.data.layouts import EncoderDecoderLayout
from moe_jax.data.tasks.texts import (
  DenoisedRows,
  PrefixLM,
  SpanCorruption,
  windows,
)

EOS = 9
SENTINELS = tuple(range(1000, 1100))


def test_windows_are_even_and_stay_in_their_document():
  # The stream has documents of 10, 4, 1 and 5 tokens; windows are at most 4
  # long.
  starts = np.array([0, 10, 14, 15])
  assert windows(starts, 20, 4).tolist() == [
    [0, 3], [3, 6], [6, 10], [10, 14], [15, 17], [17, 20]
  ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(2, 13))
def test_windows_cover_every_document_once(lengths, longest):
  starts = np.cumsum([0, *lengths[:-1]])
  bounds = windows(starts, sum(lengths), longest)
  sizes = bounds[:, 1] - bounds[:, 0]
  assert (sizes <= longest).all() and (sizes > 1).all()
  covered = [i for begin, end in bounds.tolist() for i in range(begin, end)]
  # Windows cover every token, except documents of one token and, for windows of
  # at most 2 tokens, single tokens.
  short = [i for n, s in zip(lengths, starts) if n == 1 for i in [s]]
  if longest > 2:
    assert sorted({*covered, *short}) == list(range(sum(lengths)))
  assert len(covered) == len(set(covered))
  document_index = np.searchsorted(starts, bounds[:, 0], side='right')
  assert (
    document_index == np.searchsorted(starts, bounds[:, 1] - 1, side='right')
  ).all()


def corpus(lengths=(150, 37, 3, 60, 9, 2, 200), seed=0):
  """Returns a stream of random documents, their starts and their texts."""
  generator = np.random.default_rng(seed)
  texts = [np.append(generator.integers(10, 99, n), EOS) for n in lengths]
  starts = np.cumsum([0, *(len(text) for text in texts[:-1])])
  return np.concatenate(texts).astype(np.uint16), starts, texts


def span_rows(pack=True, T_enc=32, T_dec=18):
  tokens, starts, _ = corpus()
  layout = EncoderDecoderLayout(T_enc, T_dec, start_id=EOS)
  task = SpanCorruption(layout, SENTINELS, EOS)
  return DenoisedRows((tokens, starts), task, pack=pack)


def texts_of(batch):
  """Returns the text of each segment of a batch, its sentinels filled in."""
  texts = []
  for b in range(len(batch['tokens'])):
    for segment in range(1, batch['segment_ids'][b].max() + 1):
      in_decoder = batch['segment_ids'][b] == segment
      in_encoder = batch['encoder_segment_ids'][b] == segment
      spans, span = {}, None
      for token in batch['targets'][b][in_decoder].tolist():
        if token in SENTINELS:
          span = spans.setdefault(token, [])
        elif token != EOS:
          span.append(token)
      *inputs, eos = batch['encoder_tokens'][b][in_encoder].tolist()
      assert eos == EOS
      texts.append([u for t in inputs for u in spans.get(t, [t])])
  return texts


def test_an_epoch_has_the_whole_corpus():
  rows = span_rows()
  texts = texts_of(rows.take(np.arange(len(rows))))
  tokens = sorted(t for text in texts for t in text)
  assert tokens == sorted(t for t in corpus()[0].tolist() if t != EOS)
  assert len(rows) < len(span_rows(pack=False))


def test_epochs_differ_in_noise_and_not_in_text():
  rows = span_rows(pack=False)
  all_rows, ones = np.arange(len(rows)), np.ones(len(rows), np.int64)
  first, second = (rows.draw(all_rows, 5, e * ones) for e in (0, 1))
  assert texts_of(first) == texts_of(second)
  is_same_row = (first['encoder_tokens'] == second['encoder_tokens']).all(1)
  assert is_same_row.mean() < 0.3


@pytest.mark.parametrize('shares', [[[0, 1, 2], [3, 4, 5]], [[0, 4], [4, 5]]])
def test_a_batch_does_not_depend_on_who_takes_it(shares):
  rows = span_rows()
  arguments = {'batch_size': 6, 'seed': 3}
  whole = batch_dataset(rows, **arguments)
  for share in map(np.array, shares):
    part = batch_dataset(rows, **arguments, share=share)
    for i in (7, 0, 41):  # in any order, and in later epochs too
      for name, values in whole[i].items():
        np.testing.assert_array_equal(part[i][name], values[share])


def test_an_evaluation_sees_every_row_once():
  rows = span_rows()
  batches = list(eval_batches(rows, batch_size=5))
  texts = [text for batch in batches for text in texts_of(batch)]
  assert texts == texts_of(rows.take(np.arange(len(rows))))
  assert len({batch['tokens'].shape for batch in batches}) == 1


def test_noise_is_as_dense_as_asked():
  rows = span_rows(T_enc=60, T_dec=30)
  batch = rows.take(np.arange(len(rows)))
  num_noise = np.isin(batch['targets'], (0, EOS, *SENTINELS), invert=True).sum()
  num_tokens = sum(len(text) for text in texts_of(batch))
  assert abs(num_noise / num_tokens - 0.15) < 0.02


def test_a_document_ends_in_the_targets_of_a_prefix_lm():
  tokens, starts, texts = corpus()
  layout = EncoderDecoderLayout(24, 20, start_id=EOS)
  task = PrefixLM(layout, eos_id=EOS)
  rows = DenoisedRows((tokens, starts), task, pack=False)
  batch = rows.take(np.arange(len(rows)))
  ends = (batch['targets'] == EOS).sum(1)
  assert ends.sum() == len(texts) and ends.max() == 1
  # An end of text, where there is one, is the row's last target.
  for row, end in zip(batch['targets'], ends):
    real = row[row > 0]
    assert (real[-1] == EOS) == end
