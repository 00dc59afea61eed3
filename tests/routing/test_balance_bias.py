"""Balancing by a bias: chosen experts, their gates, and how the bias moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.routing import balance_bias

LOGITS = jnp.log(jnp.array([[[0.5, 0.3, 0.2]]], jnp.float32))


@functools.partial(jax.jit, static_argnames='gates')
def choice(bias, gates):
  bias = jnp.asarray(bias, jnp.float32)
  scores = 'sigmoid' if gates == 'sigmoid' else 'softmax'
  scores = balance_bias.biased_scores(LOGITS, bias, scores)
  return routing.token_choice(
    LOGITS,
    num_selected=1,
    capacity=None,
    gates=gates,
    expert_index=routing.choose(scores, 1),
  )


def test_the_bias_decides_who_is_chosen_and_not_what_it_weighs():
  # The first of three experts is the likeliest; a bias of -0.25 puts it behind
  # the second, whose gate is its own probability without the bias.
  assert int(choice(np.zeros(3), 'raw').expert_index.item()) == 0
  pushed = choice(np.array([-0.25, 0, 0]), 'raw')
  assert int(pushed.expert_index.item()) == 1
  np.testing.assert_allclose(pushed.gate.item(), 0.3, rtol=1e-6)
  # Sigmoids of these logits are 1/3, 0.23 and 1/6, so that a smaller bias is
  # enough.
  assert int(choice(np.array([-0.1, 0, 0]), 'raw').expert_index.item()) == 0
  pushed = choice(np.array([-0.11, 0, 0]), 'sigmoid')
  assert int(pushed.expert_index.item()) == 1
  np.testing.assert_allclose(pushed.gate.item(), 0.3 / 1.3, rtol=1e-6)


def test_a_bias_moves_against_the_load():
  # The mean load is 4: above it the bias falls, below it it rises, and at it it
  # stays; layers are independent. The third had no token.
  load = jnp.array([[9, 1, 2, 4], [4] * 4, [0] * 4], jnp.float32)
  bias = jnp.full((3, 4), 0.5, jnp.float32)
  new_bias = balance_bias.moved(bias, load, 0.01)
  expected = [[0.49, 0.51, 0.51, 0.5], [0.5] * 4, [0.5] * 4]
  np.testing.assert_allclose(new_bias, expected, rtol=1e-6)
  # By the rule 'error' a step is as long as the load is wrong, relative to the
  # mean: -5/4, 3/4, 2/4 and 0.
  new_bias = balance_bias.moved(bias, load, 0.01, 'error')
  expected = [[0.4875, 0.5075, 0.505, 0.5], [0.5] * 4, [0.5] * 4]
  np.testing.assert_allclose(new_bias, expected, rtol=1e-6)


def test_the_bias_has_no_gradient():
  def total(bias, logits):
    scores = balance_bias.biased_scores(logits, bias, 'sigmoid')
    chosen = routing.token_choice(
      logits,
      num_selected=2,
      capacity=None,
      gates='sigmoid',
      expert_index=routing.choose(scores, 2),
    )
    return chosen.gate.sum()

  d_bias, d_logits = jax.jit(jax.grad(total, (0, 1)))(jnp.zeros(3), LOGITS)
  assert not np.any(d_bias)
  assert np.count_nonzero(d_logits) == 2
