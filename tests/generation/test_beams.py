"""Beam search: one step by hand, and the search against all sequences.

Parity with transformers is in `test_transformers.py`.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from moe_jax import generation
from moe_jax.generation import beams
from moe_jax.routing.capacity import All
from tests.models import tiny

PROMPTS = [[3, 1], [2], [0, 4, 4]]


advance = jax.jit(beams.advance)


def start(width, length):
  tokens = np.zeros((1, length), np.int32)
  return beams.first_search(np.array([7]), tokens, 0, width)


def step(search, probs, stops=(), penalty=1.0):
  """One step of the search, from next-token probabilities [B, W, V]."""
  log_probs = np.log(np.asarray(probs, np.float32))
  return advance(search, log_probs, np.int32(stops), np.float32(penalty))


def test_two_steps_told():
  # At first both beams are the prompt, so that only one counts; its two best
  # tokens are 2 (0.6) and 1 (0.3).
  search, beam = step(start(2, 3), [[[0.1, 0.3, 0.6]] * 2], stops=[0])
  np.testing.assert_array_equal(search.last, [[2, 1]])
  np.testing.assert_array_equal(beam, [[0, 0]])
  assert np.isneginf(search.ended.scores).all() and search.open.all()
  # The best are then 2 0 (0.6 * 0.5), which ends, 1 2 (0.3 * 0.9) and 2 2 (0.6
  # * 0.4). The first is a result, and the others continue beams 1 and 0.
  probs = [[[0.5, 0.1, 0.4], [0.05, 0.05, 0.9]]]
  search, beam = step(search, probs, stops=[0])
  np.testing.assert_array_equal(search.tokens[0, :, :2], [[1, 2], [2, 2]])
  np.testing.assert_array_equal(beam, [[1, 0]])
  np.testing.assert_allclose(np.exp(search.scores), [[0.27, 0.24]], rtol=1e-5)
  np.testing.assert_array_equal(search.ended.tokens[0, 0, :2], [2, 0])
  np.testing.assert_array_equal(search.ended.lengths, [[2, 0]])
  np.testing.assert_allclose(search.ended.scores[0, 0], np.log(0.3) / 2, 1e-5)
  assert search.open.all()


def test_what_ends_outside_of_the_best_does_not_count():
  # The third best candidate ends, and two others continue: it is too late to be
  # a result.
  search, _ = step(start(2, 3), [[[0.2, 0.3, 0.5]] * 2], stops=[0])
  assert np.isneginf(search.ended.scores).all()
  np.testing.assert_array_equal(search.last, [[2, 1]])


def test_a_search_ends_when_no_beam_can_reach_the_results():
  # There is one beam. The stop token is by far the best, and all continuations
  # are worse.
  search, _ = step(start(1, 5), [[[0.9, 0.06, 0.04]]], stops=[0])
  assert not search.open.any()
  # A closed search keeps its results.
  later_search, _ = step(search, [[[0.99, 0.005, 0.005]]], stops=[0])
  np.testing.assert_array_equal(later_search.ended.tokens, search.ended.tokens)


def of_five_tokens(moe, **model):
  """A model with V=5, so that all sequences can be listed."""
  options = tiny.options(moe | dict(capacity=All()), **model)
  model = dataclasses.replace(options, vocab_size=5).build()
  return model, jax.tree.map(lambda x: 2 * x, tiny.params_of(model, 2))


def every_sequence(model, params, prompt, length, stops, penalty):
  """All (score, sequence), by whole forward passes, the best first."""
  rows = np.array(list(itertools.product(range(5), repeat=length)), np.int32)
  prompts = np.tile(np.array(prompt, np.int32), (len(rows), 1))
  tokens = np.concatenate([prompts, rows[:, :-1]], axis=1)
  logits, _ = tiny.apply(model)(params, tokens)
  log_probs = np.asarray(jax.nn.log_softmax(logits[:, len(prompt) - 1 :]))
  scores = {}
  for row, table in zip(rows, log_probs):
    ends = [i for i, token in enumerate(row) if token in stops]
    n = ends[0] + 1 if ends else length
    score = sum(table[i, row[i]] for i in range(n)) / n**penalty
    scores[tuple(row[:n].tolist())] = score
  return sorted(((s, row) for row, s in scores.items()), reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('moe', 'model', 'penalty', 'stops'),
  [
    ({}, dict(embedding=dict(tie=False)), 1.0, [3]),
    # Beams of an LSTM move with their states.
    (dict(layers='1'), dict(kind='lstm'), 0.0, []),
  ],
)
def test_a_beam_as_wide_as_all_sequences_finds_the_best(
  moe, model, penalty, stops
):
  model, params = of_five_tokens(moe, **model)
  N = 3
  options = dict(num_tokens=N, length_penalty=penalty, stop_ids=stops)
  results = generation.beam_search(
    model, {'params': params}, PROMPTS, num_beams=5**N, num_return=6, **options
  )
  for b, prompt in enumerate(PROMPTS):
    expected = every_sequence(model, params, prompt, N, stops, penalty)[:6]
    for r, (score, row) in enumerate(expected):
      n = results.lengths[b, r]
      assert tuple(results.tokens[b, r, :n].tolist()) == row
      np.testing.assert_allclose(results.scores[b, r], score, rtol=1e-4)
  assert (len(np.unique(results.lengths)) > 1) == bool(stops)


@pytest.mark.slow
def test_forced_tokens_count_as_length_and_cost_nothing():
  model, params = of_five_tokens({}, embedding=dict(tie=False))
  options = dict(num_beams=3, length_penalty=1.0)
  forced = generation.beam_search(
    model, {'params': params}, [[3, 1]], forced_ids=[2], num_tokens=4,
    **options,
  )  # fmt: skip
  prompted = generation.beam_search(
    model, {'params': params}, [[3, 1, 2]], num_tokens=3, **options
  )
  assert forced.tokens[0, 0].tolist() == [2, *prompted.tokens[0, 0].tolist()]
  np.testing.assert_allclose(forced.scores * 4, prompted.scores * 3, rtol=1e-5)
