"""Generated tokens equal those of whole forward passes, row by row.

The forward pass is the model's own call, without a cache, one row at a time,
and drops nothing.
"""

import jax
import numpy as np
import pytest

from moe_jax import generation, models, partitioning
from moe_jax.routing.capacity import All, PerToken
from tests.models import tiny

PROMPTS = [[3, 17, 5, 8], [11], [20, 6], [1, 14, 9], [8, 0], [19]]
NEW = 6


def model_and_params(capacity=PerToken(0.3)):
  """A decoder whose capacity would drop tokens in training."""
  # With tied embeddings a random model repeats itself.
  parts = dict(attention=dict(num_kv_heads=2), ffn=dict(activation='swiglu'))
  options = dict(embedding=dict(tie=False), **parts)
  model = tiny.build(dict(capacity=capacity), **options)
  # Parameters are large, so that every token and position matters.
  return model, jax.tree.map(lambda x: 2.5 * x, tiny.params_of(model, 1))


def generate(model, params, prompts=PROMPTS, **options):
  options = dict(num_tokens=NEW) | options
  return generation.generate(model, {'params': params}, prompts, **options)


def likeliest(params, new_rows):
  """The likeliest token after each prefix of the answers, by one pass."""
  model, _ = model_and_params(All())
  tokens = np.zeros((len(PROMPTS), max(map(len, PROMPTS)) + NEW - 1), np.int32)
  for row, prompt, answer in zip(tokens, PROMPTS, new_rows):
    row[: len(prompt) + NEW - 1] = [*prompt, *answer[:-1]]
  logits, _ = tiny.apply(model)(params, tokens)  # rows are padded at their end
  return [
    row[len(prompt) - 1 :][:NEW]
    for row, prompt in zip(np.asarray(logits.argmax(-1)), PROMPTS)
  ]


def test_greedy_tokens_are_the_likeliest_of_the_whole_forward():
  model, params = model_and_params()
  output = generate(model, params)
  np.testing.assert_array_equal(output.lengths, [NEW] * 6)
  expected = likeliest(params, output.rows)
  np.testing.assert_array_equal(output.tokens, expected)
  assert len(np.unique(output.tokens)) > 3


# The longest prompt and a shortest one, which is padded most in a batch.
ALONE = (0, 5)
DRAWN = dict(temperature=1.5, top_p=0.9)


@pytest.mark.slow
def test_a_row_alone_is_the_row_in_a_batch():
  model, params = model_and_params()
  seeds = [4, 9, 1, 7, 2, 30]
  together = generate(model, params, seed=seeds, **DRAWN).rows
  for i in ALONE:
    alone = generate(model, params, [PROMPTS[i]], seed=seeds[i], **DRAWN)
    np.testing.assert_array_equal(alone.rows[0], together[i])


@pytest.fixture(scope='module')
def prepared():
  """A prepared decoder, which tests share."""
  model, params = model_and_params()
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
  model, params = model_and_params()
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
  model, params = model_and_params()
  streamed = []
  output = generate(
    model,
    params,
    forced_ids=[14, 9],
    on_token=lambda n, tokens: streamed.append(tokens.tolist()),
  )
  np.testing.assert_array_equal(output.tokens[:, :2], [[14, 9]] * 6)
  np.testing.assert_array_equal(np.array(streamed).T, output.tokens)
  expected = np.array(likeliest(params, output.rows))
  np.testing.assert_array_equal(output.tokens[:, 2:], expected[:, 2:])
  assert (output.tokens[:, :2] != expected[:, :2]).any(axis=1).all()


@pytest.mark.slow
def test_sharded_parameters_generate_the_same():
  model, params = model_and_params()
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
