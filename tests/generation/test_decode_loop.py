"""Generated tokens equal those of whole forward passes, row by row.

The forward pass is the model's own call, without a cache, one row at a time,
and drops nothing.
"""

import jax
import numpy as np
import pytest

from moe_jax import generation, models, partitioning
from moe_jax.layers.positions import Relative
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import All, PerToken
from tests.models import tiny

PROMPTS = [[3, 17, 5, 8], [11], [20, 6], [1, 14, 9], [8, 0], [19]]
NEW, START = 6, 2
# This capacity would drop tokens in training; generation drops none.
TIGHT = dict(capacity=PerToken(0.3))
ROOM = dict(capacity=All())
KINDS = {
  'rotary': dict(attention=dict(num_kv_heads=2), ffn=dict(activation='swiglu')),
  'lstm': dict(kind='lstm', num_layers=3, moe=dict(layers='1')),
  't5': dict(
    kind='encoder_decoder',
    positions=Relative(),
    attention=dict(scale='none'),
    encoder=EncoderOptions(3),
  ),
}


def model_and_params(name, moe):
  # With tied embeddings a random model repeats itself.
  options = dict(KINDS[name])
  options['embedding'] = {'tie': False, **options.get('embedding', {})}
  model = tiny.build(moe | options.pop('moe', {}), **options)
  # Parameters are large, so that every token and position matters.
  return model, jax.tree.map(lambda x: 2.5 * x, tiny.params_of(model, 1))


def starts(model):
  if model.has_encoder:
    return {'start_id': START}
  return {}


def generate(model, params, prompts=PROMPTS, **options):
  options = dict(num_tokens=NEW) | starts(model) | options
  return generation.generate(model, {'params': params}, prompts, **options)


def likeliest(name, params, new_rows):
  """The likeliest token after each prefix of the answers, by one pass."""
  model, _ = model_and_params(name, ROOM)
  answers = [row.tolist() for row in new_rows]
  if model.has_encoder:
    rows = [[START, *answer[:-1]] for answer in answers]
    halves = zip(rows_of(PROMPTS), rows_of(rows))
    inputs = [array for pair in halves for array in pair]
    logits = tiny.apply(model)(params, *inputs)[0]
  else:
    rows = [prompt + answer[:-1] for prompt, answer in zip(PROMPTS, answers)]
    logits = tiny.apply(model)(params, *rows_of(rows))[0]
  best_tokens = np.asarray(logits.argmax(-1))
  return [
    row[len(tokens) - len(answer) : len(tokens)]
    for row, tokens, answer in zip(best_tokens, rows, answers)
  ]


def rows_of(rows):
  """Tokens and segment ids of rows, padded at their end."""
  length = max(map(len, rows))
  tokens = np.zeros((len(rows), length), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  lengths = np.array(list(map(len, rows)))
  segments = np.arange(length)[None] < lengths[:, None]
  return tokens, segments.astype(np.int32)


# The others differ from these in one part each.
FAST = ('rotary',)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in KINDS
  ],
)
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward(name):
  model, params = model_and_params(name, TIGHT)
  output = generate(model, params)
  np.testing.assert_array_equal(output.lengths, [NEW] * 6)
  expected = likeliest(name, params, output.rows)
  np.testing.assert_array_equal(output.tokens, expected)
  assert len(np.unique(output.tokens)) > 3


# The longest prompt and a shortest one, which is padded most in a batch.
ALONE = (0, 5)
DRAWN = dict(temperature=1.5, top_p=0.9)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rotary', 't5'])
def test_a_row_alone_is_the_row_in_a_batch(name):
  model, params = model_and_params(name, TIGHT)
  seeds = [4, 9, 1, 7, 2, 30]
  together = generate(model, params, seed=seeds, **DRAWN).rows
  for i in ALONE:
    alone = generate(model, params, [PROMPTS[i]], seed=seeds[i], **DRAWN)
    np.testing.assert_array_equal(alone.rows[0], together[i])


@pytest.fixture(scope='module')
def prepared():
  """A prepared decoder, which tests share."""
  model, params = model_and_params('rotary', TIGHT)
  return generation.prepare(model, {'params': params})


@pytest.mark.slow
def test_a_seed_gives_the_same_tokens_and_another_others(prepared):
  options = dict(num_tokens=NEW, temperature=4.0)
  first, again, other = (
    generation.generate(*prepared, PROMPTS, seed=seed, **options).tokens
    for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any(axis=1).all()
  same = generation.generate(*prepared, [[7]] * 4, seed=3, **options).tokens
  assert len(np.unique(same, axis=0)) == 4
  # At this temperature all tokens are as likely: a draw that all steps shared
  # would repeat one token.
  options['temperature'] = 1e4
  even = generation.generate(*prepared, PROMPTS, seed=3, **options).tokens
  assert all(len(np.unique(row)) > 1 for row in even)


def test_rows_end_with_their_stop_tokens():
  model, params = model_and_params('rotary', TIGHT)
  endless = generate(model, params).tokens.tolist()
  stops = [endless[0][1], endless[1][4]]
  output = generate(model, params, stop_ids=stops, pad_id=22)
  for row, length, free_row in zip(output.tokens, output.lengths, endless):
    ends = [i for i, token in enumerate(free_row) if token in stops]
    assert length == (ends[0] + 1 if ends else NEW)
    np.testing.assert_array_equal(row[:length], free_row[:length])
    assert (row[length:] == 22).all()
  assert len(set(output.lengths.tolist())) > 1


@pytest.mark.parametrize('last', [NEW, 2])
def test_streamed_tokens_are_the_same_until_a_true_answer(prepared, last):
  options = dict(num_tokens=NEW, stop_ids=range(9))
  streamed = {}

  def on_token(n, tokens):
    streamed[n] = tokens
    return n == last

  plain = generation.generate(*prepared, PROMPTS, **options)
  output = generation.generate(*prepared, PROMPTS, on_token=on_token, **options)
  lengths = np.minimum(plain.lengths, last + 1)
  np.testing.assert_array_equal(output.lengths, lengths)
  assert lengths.min() < 3 < plain.lengths.max()
  assert list(streamed) == list(range(lengths.max()))
  for n, tokens in streamed.items():
    np.testing.assert_array_equal(output.tokens[:, n], plain.tokens[:, n])
    # Ended rows are -1.
    expected = np.where(n < lengths, output.tokens[:, n], -1)
    np.testing.assert_array_equal(tokens, expected)


def test_forced_tokens_come_first():
  model, params = model_and_params('rotary', TIGHT)
  streamed = []
  output = generate(
    model,
    params,
    forced_ids=[14, 9],
    on_token=lambda n, tokens: streamed.append(tokens.tolist()),
  )
  np.testing.assert_array_equal(output.tokens[:, :2], [[14, 9]] * 6)
  np.testing.assert_array_equal(np.array(streamed).T, output.tokens)
  expected = np.array(likeliest('rotary', params, output.rows))
  np.testing.assert_array_equal(output.tokens[:, 2:], expected[:, 2:])
  assert (output.tokens[:, :2] != expected[:, :2]).any(axis=1).all()


@pytest.mark.slow
def test_sharded_parameters_generate_the_same():
  model, params = model_and_params('rotary', TIGHT)
  mesh = partitioning.make_mesh({'data': 2, 'tensor': 2}, jax.devices()[:4])
  trees = models.describe(model)
  rules = partitioning.ShardingOptions().rules
  shardings = partitioning.tree_shardings(mesh, rules, trees.axes, trees.shapes)
  split = jax.device_put(params, shardings)
  for options in ({}, {'temperature': 1.5, 'top_p': 0.9}, {'num_beams': 3}):
    tokens = generate(model, split, **options).tokens
    expected = generate(model, params, **options).tokens
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_beams_are_an_option_of_generate(prepared):
  options = dict(num_tokens=NEW, stop_ids=[5], length_penalty=0.5)
  output = generation.generate(*prepared, PROMPTS, num_beams=3, **options)
  beams = generation.beam_search(*prepared, PROMPTS, num_beams=3, **options)
  np.testing.assert_array_equal(output.tokens, beams.tokens[:, 0])
  np.testing.assert_array_equal(output.lengths, beams.lengths[:, 0])
  with pytest.raises(ValueError, match=r'length_penalty=0\.5 with num_beams=1'):
    generation.generate(*prepared, PROMPTS, **options)
