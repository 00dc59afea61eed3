"""Sampling against a greedy loop in plain Python, and as draws."""

import jax
import numpy as np
import pytest

from moe_jax.generation import sample
from tests.models import oracle, tiny
from tests.models.tiny import V

MOE = dict(capacity_rule='all')
OPTIONS = dict(activation='relu', tie_embeddings=False)
MODEL = tiny.build(MOE, **OPTIONS)
PARAMS = tiny.params_of(MODEL)
PROMPT = np.array([3, 17, 5])


def draw(prompt=PROMPT, **changes):
  options = dict(
    num_tokens=11, context_len=7, temperature=0.0, key=jax.random.key(0)
  )
  return sample(MODEL, PARAMS, prompt, **{**options, **changes})


def greedy(prompt, num_tokens, context_len):
  """The largest logit of a numpy model, again and again."""
  text = list(prompt)
  for _ in range(num_tokens):
    context = np.array(text[-context_len:])
    logits, _ = oracle.decode(tiny.config(MOE, **OPTIONS), PARAMS, context)
    text.append(int(logits[-1].argmax()))
  return text[len(prompt) :]


@pytest.mark.parametrize('length', [3, 7, 12])
def test_temperature_zero_is_greedy_also_when_the_window_is_full(length):
  # Prompts shorter than the window, as long, and longer.
  prompt = tiny.tokens(5, (length,))
  expected = greedy(prompt, 11, 7)
  assert len(set(expected)) > 3
  np.testing.assert_array_equal(draw(prompt), expected)


def test_the_same_key_gives_the_same_text():
  first, again = (draw(temperature=1.0) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  other = draw(temperature=1.0, key=jax.random.key(1))
  assert (first != other).any()
  assert first.dtype == np.int32
  assert first.shape == (11,)


@pytest.mark.parametrize('temperature', [0.4, 0.8])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(temperature):
  config = tiny.config(MOE, **OPTIONS)
  logits = oracle.decode(config, PARAMS, PROMPT)[0][-1]
  count = np.zeros(V)
  for seed in range(400):
    count[
      draw(num_tokens=1, temperature=temperature, key=jax.random.key(seed))
    ] += 1

  def distance(t):
    p = np.exp(logits / t - (logits / t).max())
    return np.abs(count / 400 - p / p.sum()).sum() / 2

  assert distance(temperature) < 0.12
  assert min(distance(temperature / 3), distance(temperature * 3)) > 0.18


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(prompt=np.array([], int)), 'prompt is empty'),
    (dict(num_tokens=0), 'num_tokens=0'),
    (dict(context_len=0), 'context_len=0'),
    (dict(temperature=-0.5), 'temperature=-0.5 not negative'),
  ],
)
def test_bad_requests_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    draw(**options)
