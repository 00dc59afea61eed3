"""Token choice with groups of experts, scaled gates and DeepSeek's gates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import TokenChoice
from tests import reference
from tests.layers.routers.run import G, M, S, draw, route

E, K = 12, 3
V2 = TokenChoice(
  gate_scale=16.0,
  expert_groups=4,
  chosen_expert_groups=2,
  outside_expert_groups='zero',
)
V3 = TokenChoice(
  gates='sigmoid_renormalized',
  gate_scale=2.5,
  balance_bias_rate=0.001,
  expert_groups=4,
  chosen_expert_groups=2,
  expert_group_score='two_best',
)
BIAS = np.random.default_rng(8).normal(0, 0.6, E).astype(np.float32)


def published(options, logits, bias):
  """The experts and gates of one token, step by step from the papers."""
  sigmoid = options.gates.startswith('sigmoid')
  score = 1 / (1 + np.exp(-logits)) if sigmoid else reference.softmax(logits)
  biased = score + bias if options.keeps_state else score
  best = {'best': 1, 'two_best': 2}[options.expert_group_score]
  outside = 0.0 if options.outside_expert_groups == 'zero' else -np.inf
  limited = reference.limited_scores(biased, 4, 2, best, outside)
  chosen = reference.choose(limited, K)
  gate = score[chosen]  # without the bias
  if options.gates == 'sigmoid_renormalized':
    gate = gate / (gate.sum() + 1e-20)
  return chosen, gate * options.gate_scale


SIGMOID = dataclasses.replace(V3, gates='sigmoid')


@pytest.mark.parametrize(
  'options', [V3, V2, pytest.param(SIGMOID, marks=pytest.mark.slow)]
)
def test_experts_and_gates_are_those_of_the_papers(options):
  w, x = draw(M, E, seed=1), draw(G, S, M)
  state = {'balance_bias': jnp.asarray(BIAS)} if options.keeps_state else None
  sizes = dict(num_experts=E, num_selected=K)
  chosen, aux = route(options, {'w': w}, x, state=state, **sizes)
  logits = x.astype(np.float64) @ w
  for g, s in np.ndindex(G, S):
    index, gate = published(options, logits[g, s], BIAS)
    assert chosen.expert_index[g, s].tolist() == index
    np.testing.assert_allclose(chosen.gate[g, s], gate, rtol=1e-4)
  # Losses are those of gates before the factor, and of all experts' logits.
  balance = reference.balance_loss(
    reference.softmax(logits), chosen.expert_index, np.ones((G, S), bool)
  )
  np.testing.assert_allclose(aux.balance_loss, S * balance.sum(), rtol=1e-4)


def test_gates_of_sigmoids_that_vanish_stay_finite():
  # With logits of -60 the sum of the sigmoids is far below 1e-20, and so are
  # the gates; their gradient is finite, too.
  def total(x):
    options = dataclasses.replace(V3, balance_bias_rate=0.0)
    w, sizes = np.eye(E, dtype=np.float32), dict(num_experts=E, num_selected=K)
    return route(options, {'w': w}, x, ids=None, **sizes)[0].gate.sum()

  value, gradient = jax.value_and_grad(total)(jnp.full((1, 1, E), -60.0))
  assert 0 < value < 1e-4
  assert np.isfinite(gradient).all()
