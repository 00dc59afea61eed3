"""A pattern of layers tells which layers of a model share a loop."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.models.pattern import (
  MAX_PERIOD,
  segments,
  sparse_numbers,
  sparse_pattern,
)


def flags(text):
  return tuple(letter == 'S' for letter in text)


@pytest.mark.parametrize(
  ('layers', 'num_layers', 'expected'),
  [
    # These are the patterns of Mixtral, Switch and GLaM, ST-MoE and NLLB-MoE,
    # and OpenMoE.
    ('all', 32, [('layers', 'S', 32)]),
    ('every 2', 24, [('layers', 'DS', 12)]),
    ('every 4', 24, [('layers', 'DDDS', 6)]),
    ('every 6', 24, [('layers', 'DDDDDS', 4)]),
    ('none', 24, [('layers', 'D', 24)]),
    # These are V-MoE's last two layers, those of a small model, and an odd
    # depth.
    ('last 2', 24, [('layers_0', 'D', 22), ('layers_1', 'S', 2)]),
    ('last 2', 4, [('layers', 'DDSS', 1)]),
    ('every 2', 25, [('layers_0', 'DS', 12), ('layers_1', 'D', 1)]),
    # Two layers are chosen by number.
    (
      '11, 9',
      24,
      [('layers_0', 'D', 9), ('layers_1', 'SD', 2), ('layers_2', 'D', 11)],
    ),
  ],
)
def test_segments_of_published_patterns(layers, num_layers, expected):
  loops = segments(sparse_pattern(layers, num_layers))
  assert loops == [(name, flags(p), n) for name, p, n in expected]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_segments_put_together_are_the_layers(pattern):
  loops = segments(tuple(pattern))
  layers = [flag for s in loops for flag in s.pattern * s.repeats]
  assert layers == pattern
  assert sum(s.num_layers for s in loops) == len(pattern)
  assert all(1 <= len(s.pattern) <= MAX_PERIOD for s in loops)
  assert len({s.name for s in loops}) == len(loops)


@pytest.mark.parametrize('layers', ['all', 'none', 'every 3', '1,3'])
def test_sparse_layers_are_counted_without_a_list(layers):
  numbers = {i for i, flag in enumerate(sparse_pattern(layers, 7)) if flag}
  assert set(sparse_numbers(layers, 7)) == numbers


def test_a_list_is_not_made_to_count():
  assert len(sparse_numbers('every 2', 10**15)) == 5 * 10**14
