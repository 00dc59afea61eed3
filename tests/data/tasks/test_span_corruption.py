"""Corrupted spans: by hand, by a plain loop, and restored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout
from moe_jax.data.tasks.texts import (
  SpanCorruption,
  corrupt,
  noise_counts,
  noise_mask,
)

EOS = 9
SENTINELS = tuple(range(100, 150))


def make_task(layout=None, **options):
  layout = layout or EncoderDecoderLayout(64, 48, start_id=EOS)
  return SpanCorruption(layout, SENTINELS, EOS, **options)


# Two spans of the text `10 11 12 13 14 15 16` are removed: 11, and 14 15.
WINDOW = np.arange(10, 17, dtype=np.uint16)
MASK = np.array([0, 1, 0, 0, 1, 1, 0], bool)


def test_each_span_leaves_a_sentinel_and_follows_its_own():
  inputs, targets = corrupt(WINDOW, MASK, np.array(SENTINELS))
  assert inputs.tolist() == [10, 100, 12, 13, 101, 16]
  assert targets.tolist() == [100, 11, 101, 14, 15]


def test_as_many_sentinels_as_spans_are_enough():
  _, targets = corrupt(WINDOW, MASK, np.array(SENTINELS[:2]))
  assert targets.tolist() == [100, 11, 101, 14, 15]


def test_spans_at_both_ends():
  inputs, targets = corrupt(WINDOW, ~MASK, np.array(SENTINELS))
  assert inputs.tolist() == [100, 11, 101, 14, 15, 102]
  assert targets.tolist() == [100, 10, 101, 12, 13, 102, 16]


class Chosen(np.random.Generator):
  """A generator of random numbers that returns the draws of its arguments."""

  def __init__(self, *draws):
    super().__init__(np.random.PCG64())
    self.draws = list(draws)

  def choice(self, total, count, replace):
    draw = self.draws.pop(0)
    assert len(draw) == count and not replace and max(draw) < total
    return np.array(draw)


def test_an_example_by_hand():
  # Two spans have 3 of 7 tokens; the cut after the first makes them 1 and 2
  # tokens long. The 4 kept ones lie around them in 3 stretches, of which the
  # outer two may be empty: 6 = 2 + 2 + 2 is 1, 2 and 1.
  counts = noise_counts(np.array([7]), 0.4, 1.5)
  assert [c.tolist() for c in counts] == [[3], [2]]
  draws = [0], [3, 1]
  example = make_task(density=0.4, mean_span=1.5)(WINDOW, Chosen(*draws))
  assert example.inputs.tolist() == [10, 100, 12, 13, 101, 16, EOS]
  assert example.targets.tolist() == [100, 11, 101, 14, 15, 102, EOS]
  # T5's checkpoints expect this form. The window here begins with a mode token
  # and ends with an end of text, which is not corrupted.
  task = make_task(density=0.4, mean_span=1.5, final_sentinel=False, mode_id=77)
  example = task(np.append(WINDOW, EOS), Chosen(*draws))
  assert example.inputs.tolist() == [77, 10, 100, 12, 13, 101, 16, EOS]
  assert example.targets.tolist() == [100, 11, 101, 14, 15, EOS]


def restored_text(example, sentinels=SENTINELS):
  """Returns the text with each sentinel replaced by the targets after it."""
  spans, span = {}, None
  for token in example.targets.tolist():
    if token in sentinels:
      span = spans.setdefault(token, [])
    elif token != EOS:
      span.append(token)
  text = []
  for token in example.inputs.tolist()[:-1]:
    text += spans.get(token, [token])
  return text


sizes = st.integers(1, 300)
densities = st.floats(0.02, 0.98)
spans = st.floats(1, 40)
seeds = st.integers(0, 2**32)


@settings(max_examples=40, deadline=None)
@given(sizes, densities, spans, seeds)
def test_filling_the_sentinels_gives_the_window_back(n, density, mean, seed):
  window = 1000 + np.random.default_rng(seed).integers(0, 5, n)
  sentinels = tuple(range(2000, 2000 + n + 1))
  task = SpanCorruption(
    DecoderLayout(9), sentinels, EOS, density=density, mean_span=mean
  )
  example = task(window, np.random.default_rng(seed))
  assert restored_text(example, sentinels) == window.tolist()
  # The example has exactly the planned lengths.
  lengths = task.lengths(np.array([n]))
  assert len(example.inputs) == lengths.inputs[0]
  assert len(example.targets) == lengths.targets[0]


@settings(max_examples=40, deadline=None)
@given(sizes, densities, spans, seeds)
def test_a_mask_has_the_counted_tokens_in_the_counted_spans(
  n, density, mean, seed
):
  mask = noise_mask(n, np.random.default_rng(seed), density, mean)
  (noise,), (count,) = noise_counts(np.array([n]), density, mean)
  assert mask.sum() == noise
  assert (np.diff(mask.astype(int), prepend=0) == 1).sum() == count
  assert noise >= 1 and (noise < n or n == 1)


def test_counts_are_what_was_asked():
  # The paper's example (section 3.3.4) removes 15 % of 500 tokens, in 25 spans
  # of 3.
  noise, spans = noise_counts(np.array([500, 100, 40]), 0.15, 3.0)
  assert noise.tolist() == [75, 15, 6] and spans.tolist() == [25, 5, 2]
  # There are at most as many spans as leave a token between each two.
  noise, spans = noise_counts(np.array([10]), 0.8, 1.0)
  assert noise.tolist() == [8] and spans.tolist() == [3]


def test_every_mask_is_equally_likely():
  # Two spans have 3 of 6 tokens. There are 2 ways to cut the noise, and C(4, 2)
  # ways to cut 3 kept tokens into 3 stretches of which the outer may be empty.
  generator = np.random.default_rng(0)
  mask_counts = {}
  for _ in range(6000):
    mask = tuple(noise_mask(6, generator, 0.5, 1.5).tolist())
    mask_counts[mask] = mask_counts.get(mask, 0) + 1
  assert len(mask_counts) == 12
  assert min(mask_counts.values()) > 400 and max(mask_counts.values()) < 600


@settings(max_examples=40, deadline=None)
@given(
  st.integers(5, 90),
  st.integers(6, 90),
  st.floats(0.05, 0.6),
  st.floats(1, 9),
  st.booleans(),
)
def test_the_window_is_the_largest_that_fits(T_enc, T_dec, density, mean, last):
  layout = EncoderDecoderLayout(T_enc, T_dec, start_id=EOS)
  task = SpanCorruption(
    layout, tuple(range(1000)), EOS, density, mean, final_sentinel=last
  )
  fits = layout.fits(task.lengths(np.arange(1, 400)))
  # Shorter windows fit too, such as the last one of a document.
  assert fits[: task.window].all() and not fits[task.window :].any()


def test_t5s_lengths():
  # In T5's pre-training 568 tokens become 512 inputs and 114 targets.
  layout = EncoderDecoderLayout(512, 114, start_id=0)
  task = make_task(layout, final_sentinel=False)
  assert task.window == 568
  lengths = task.lengths(np.array([568]))
  assert (lengths.inputs[0], lengths.targets[0]) == (512, 114)


def test_both_sides_in_one_row():
  layout = DecoderLayout(30)
  task = make_task(layout)
  n = np.array([task.window, task.window + 1])
  total = task.lengths(n).total
  assert total[0] <= 31 < total[1]


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'layout': EncoderDecoderLayout(2, 7, 0)}, 'T_enc=2 and T_dec=7 are too'),
    (
      {'layout': EncoderDecoderLayout(512, 300, 0), 'mean_span': 1.0},
      'num_sentinels=50 is below the 78 that a window of 511 tokens needs',
    ),
  ],
)
def test_what_cannot_be_is_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    _ = make_task(**wrong).window
