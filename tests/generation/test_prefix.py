"""Prompts as arrays: the place of padding, and how far they may go."""

import numpy as np
import pytest

from moe_jax.generation import prepare
from moe_jax.generation.prefix import make_prefix, round_up
from moe_jax.layers.positions import Learned, Relative, Rotary
from moe_jax.layers.rotary import LongRope
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import Fraction, PerToken
from tests.models import tiny

HALVES = dict(kind='encoder_decoder', positions=Relative())


def prepared(moe=None, **model):
  built = tiny.build(moe, **model)
  return prepare(built, {'params': tiny.params_of(built)})[0]


@pytest.fixture(scope='module')
def decoder():
  return prepared()


@pytest.fixture(scope='module')
def halves():
  return prepared(**HALVES)


def make(model, prompt, **changes):
  return make_prefix(model, prompt, **{'num_tokens': 5, **changes})


def test_a_decoders_rows_end_together(decoder):
  # The longest row has 10 tokens. All but its last token are padded to 16
  # positions.
  rows = [range(1, 11), [7], [8, 9]]
  prefix = make(decoder, rows)
  assert prefix.tokens.shape == (3, 17)
  np.testing.assert_array_equal(prefix.tokens[0, 7:], range(1, 11))
  np.testing.assert_array_equal(prefix.tokens[1:, -2:], [[0, 7], [8, 9]])
  np.testing.assert_array_equal(prefix.mask.sum(1), [10, 1, 2])
  assert prefix.mask[:, -1].all() and prefix.encoder_tokens is None
  prefix = make(decoder, [[3, 4], [5]], forced_ids=[6])
  np.testing.assert_array_equal(prefix.tokens[:, -3:], [[3, 4, 6], [0, 5, 6]])
  assert make(decoder, [[3], [4]]).tokens.shape == (2, 1)
  # One row alone is a batch of one.
  for row in ([3, 4], np.array([3, 4])):
    np.testing.assert_array_equal(make(decoder, row).tokens[:, -2:], [[3, 4]])


def test_an_encoders_rows_begin_together(halves):
  prefix = make(halves, [[3, 4, 5], [6]], start_id=2, forced_ids=[9])
  np.testing.assert_array_equal(prefix.tokens, [[2, 9], [2, 9]])
  np.testing.assert_array_equal(prefix.mask, np.ones((2, 2)))
  expected = [[3, 4, 5, 0, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(prefix.encoder_tokens, expected)
  np.testing.assert_array_equal(prefix.encoder_mask, np.array(expected) > 0)


def test_an_encoder_whose_experts_choose_reads_whole_groups():
  choosing = {'moe': {'router': {'kind': 'expert_choice'}}}
  moe = dict(capacity=PerToken(), group_size=5)
  encoder = EncoderOptions(0, choosing)
  model = prepared(moe, kind='encoder_decoder', encoder=encoder)
  for length, padded in ((3, 5), (5, 5), (7, 10)):
    prefix = make(model, [range(1, 1 + length)], start_id=2)
    assert prefix.encoder_tokens.shape == (1, padded)


def test_lengths_are_few_and_not_much_longer():
  rounded = [round_up(n) for n in range(1, 1025)]
  assert rounded[:9] == [8] * 8 + [16]
  assert all(a >= n for n, a in enumerate(rounded, 1))
  assert all(a <= 1.25 * n for n, a in enumerate(rounded, 1) if n > 32)
  assert len(set(rounded)) <= 4 * 7


def test_lengths_stay_where_capacity_depends_on_them():
  model = prepared(dict(capacity=Fraction(0.5), group_size=-1), **HALVES)
  assert make(model, [[1, 2, 3]], start_id=0).encoder_tokens.shape == (1, 3)


def test_learned_positions_bound_lengths():
  # There are T=10 positions: 4 tokens and 7 new ones, of which the last is
  # never read.
  model = prepared(positions=Learned())
  assert make(model, [range(4)], num_tokens=7).tokens.shape == (1, 9)
  with pytest.raises(ValueError, match=r'11 positions .* > max_len=10'):
    make(model, [range(4)], num_tokens=8)
  assert make(model, [range(10)], num_tokens=1).tokens.shape == (1, 11)
  model = prepared(positions=Learned(), kind='encoder_decoder')
  with pytest.raises(ValueError, match='prompt of 11 positions'):
    make(model, [range(11)], start_id=0)
  with pytest.raises(ValueError, match='output of 11 positions'):
    make(model, [[1]], start_id=0, num_tokens=11)


def test_no_row_becomes_long_while_it_is_generated():
  # A document of more than 6 tokens turns by other angles from its start, which
  # a cache cannot. The last token of a prompt is a step of its own.
  positions = Rotary(scaling=LongRope((1.0,) * 3, (2.0,) * 3, original_len=6))
  model = prepared(positions=positions)
  make(model, [range(3), range(8)], num_tokens=4)
  message = 'row 1 of 2 reads 7 tokens, {} of them at once, and crosses orig'
  for length, num_tokens in ((3, 5), (6, 2), (7, 1)):
    with pytest.raises(ValueError, match=message.format(length - 1)):
      make(model, [[1], range(length)], num_tokens=num_tokens)
  model = prepared(positions=positions, kind='encoder_decoder')
  make(model, [range(9)], start_id=0, num_tokens=6)
  with pytest.raises(ValueError, match='row 0 of 1 reads 7 tokens, 0 of them'):
    make(model, [range(9)], start_id=0, num_tokens=7)
