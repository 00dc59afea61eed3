"""Windows split into a prefix and a suffix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout
from moe_jax.data.tasks.texts import PrefixLM


def target_lengths(task, n, count=400):
  """Returns the lengths of targets in many draws."""
  generator = np.random.default_rng(0)
  window = np.arange(50, 50 + n)
  lengths = []
  for _ in range(count):
    example = task(window, generator)
    lengths.append(len(example.targets))
  return lengths


def test_the_text_goes_on_in_the_targets():
  layout = EncoderDecoderLayout(7, 6, start_id=0)
  example = PrefixLM(layout, eos_id=9, mode_id=8)(
    np.array([1, 2, 3, 4], np.uint8), np.random.default_rng(0)
  )
  mode, *prefix, eos = example.inputs.tolist()
  assert (mode, eos) == (8, 9)
  assert prefix + example.targets.tolist() == [1, 2, 3, 4]
  assert prefix and len(example.targets)


def test_every_split_of_a_decoders_row_is_equally_likely():
  task = PrefixLM(DecoderLayout(9))
  assert task.window == 10
  counts = np.bincount(target_lengths(task, 10, 1800), minlength=10)
  assert counts[0] == 0 and len(counts) == 10
  assert counts[1:].min() > 140 and counts[1:].max() < 260


def test_a_suffix_is_as_long_as_asked_on_average():
  task = PrefixLM(EncoderDecoderLayout(200, 150, 0), density=0.25)
  assert task.window == 200
  lengths = target_lengths(task, 200, 1000)
  assert abs(np.mean(lengths) - 50) < 3
  assert min(lengths) < 5 and max(lengths) > 95


def test_the_decoders_length_bounds_a_suffix():
  task = PrefixLM(EncoderDecoderLayout(100, 20, 0), density=0.5)
  lengths = target_lengths(task, task.window)
  assert min(lengths) == 1 and max(lengths) == 20


@settings(max_examples=40, deadline=None)
@given(
  st.integers(4, 60),
  st.integers(0, 60),
  st.floats(0.05, 0.95),
  st.booleans(),
  st.booleans(),
  st.integers(0, 2**32),
)
def test_nothing_overflows_and_nothing_is_lost(
  T, T_dec, density, ends, has_mode, seed
):
  layout = EncoderDecoderLayout(T, T_dec, 0) if T_dec else DecoderLayout(T)
  mode_id, eos_id = 7 if has_mode else None, 8 if ends else None
  task = PrefixLM(layout, density, eos_id, mode_id)
  generator = np.random.default_rng(seed)
  for n in range(2, task.window + 1):
    window = generator.integers(10, 99, n)
    lengths = task.lengths(np.array([n]))
    assert layout.fits(lengths).all()
    inputs, targets = task(window, generator)
    assert len(inputs) <= lengths.inputs[0]
    assert len(targets) <= lengths.targets[0]
    assert len(inputs) + len(targets) == lengths.total[0]
    text = inputs[has_mode : len(inputs) - ends].tolist() + targets.tolist()
    assert text == window.tolist()
    assert len(targets) < n


def test_a_row_without_room_is_refused():
  layout = EncoderDecoderLayout(1, 9, 0)
  with pytest.raises(ValueError, match='T_enc=1 and T_dec=9 are too short'):
    _ = PrefixLM(layout, 0.5, eos_id=3).window
