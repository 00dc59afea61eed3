"""Balancing losses: values at balance and at collapse, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import (
  balance_loss,
  importance_loss,
  load_loss,
  token_choice,
  z_loss,
)
from tests import reference

balance = jax.jit(balance_loss, static_argnames='choices')
route = jax.jit(token_choice, static_argnames=('num_selected', 'capacity'))

G, S, E = 2, 7, 5
ALL = jnp.ones((G, S), bool)


@functools.cache
def example(seed, K=3):
  """Random logits, a mask, probabilities and a routing without drops."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(G, S, E))
  probs = jnp.asarray(reference.softmax(logits), jnp.float32)
  logits = jnp.asarray(logits, jnp.float32)
  mask = rng.random((G, S)) < (0.6 if seed else 1.0)
  mask[1] &= seed != 1  # a group of padding
  mask = jnp.asarray(mask)
  routing = route(logits, num_selected=K, capacity=None, mask=mask)
  return logits, mask, probs, routing


@jax.jit
def all_losses(logits, probs, gate, index, mask):
  """The losses [G] in the order of the definitions below."""
  return (
    balance_loss(probs, index, mask),
    balance_loss(probs, index, mask, 'first'),
    z_loss(logits, mask),
    importance_loss(gate, index, mask, E),
    load_loss(probs, mask),
  )


def definitions(logits, probs, gate, index, mask):
  return (
    reference.balance_loss(probs, index, mask, 'all'),
    reference.balance_loss(probs, index, mask, 'first'),
    reference.z_loss(logits, mask),
    reference.importance_loss(gate, index, mask, E),
    reference.load_loss(probs, mask),
  )


def round_robin(K):
  """Choices [1, E, K] in which every expert has each rank exactly once."""
  index = (np.arange(E)[:, None] + np.arange(K)) % E  # [E, K]
  return jnp.asarray(index[None], jnp.int32)


@pytest.mark.parametrize('choices', ['all', 'first'])
def test_balance_loss_at_perfect_balance_and_at_collapse(choices):
  K, mask = 2, jnp.ones((1, E), bool)
  probs = jnp.full((1, E, E), 1 / E)
  loss = balance(probs, round_robin(K), mask, choices)
  np.testing.assert_allclose(loss, [1.0], rtol=1e-6)
  # All tokens choose the same K experts, which share all probability evenly:
  # the loss is E / K. It is so too if only first choices count: f = 1 for one
  # expert, whose P is 1 / K.
  index = np.tile(np.arange(K, dtype=np.int32), (1, E, 1))
  probs = np.tile(np.where(np.arange(E) < K, 1 / K, 0.0), (1, E, 1))
  probs = jnp.asarray(probs, jnp.float32)
  loss = balance(probs, jnp.asarray(index), mask, choices)
  np.testing.assert_allclose(loss, [E / K], rtol=1e-6)


def test_balance_loss_by_hand():
  # Two of three tokens go to expert 0, so that Switch's f is (2/3, 1/3). The
  # mean probability P is (0.6, 0.4), and the loss
  # 2 * (2/3 * 0.6 + 1/3 * 0.4) = 16/15.
  probs = jnp.array([[[0.8, 0.2], [0.7, 0.3], [0.3, 0.7]]])
  index = jnp.array([[[0], [0], [1]]])
  loss = balance(probs, index, jnp.ones((1, 3), bool))
  np.testing.assert_allclose(loss, [16 / 15], rtol=1e-6)
  # If the last token is padding, f = (1, 0) and P = (0.75, 0.25).
  mask = jnp.array([[True, True, False]])
  np.testing.assert_allclose(balance(probs, index, mask), [1.5], rtol=1e-6)


@pytest.mark.parametrize('K', [1, 3])
def test_every_loss_follows_the_definition(K):
  for seed in range(3):
    logits, mask, probs, routing = example(seed, K)
    args = logits, probs, routing.gate, routing.expert_index, mask
    expected = definitions(*map(np.asarray, args))
    for loss, by_loops in zip(all_losses(*args), expected, strict=True):
      assert loss.dtype == jnp.float32 and loss.shape == (G,)
      np.testing.assert_allclose(loss, by_loops, rtol=1e-5)


def test_z_loss_of_zero_logits_is_log_of_the_experts_squared():
  loss = z_loss(jnp.zeros((G, S, E)), ALL)
  np.testing.assert_allclose(loss, [np.log(E) ** 2] * G, rtol=1e-6)
  # A shift changes no probability, but makes logsumexp 1000 + log(5).
  loss = z_loss(jnp.full((G, S, E), 1000.0), ALL)
  np.testing.assert_allclose(loss, [(1000 + np.log(E)) ** 2] * G, rtol=1e-6)


@pytest.mark.parametrize('choices', ['all', 'first'])
def test_balance_loss_moves_the_router_through_p_alone(choices):
  # With f fixed, dL/dx_sj = E/N p_sj (f_j - sum_e f_e p_se); differentiating
  # the routing too must add nothing to it.
  logits, mask, probs, routing = example(2)

  def loss(logits):
    routing = token_choice(logits, num_selected=3, capacity=2, mask=mask)
    return balance_loss(
      jax.nn.softmax(logits), routing.expert_index, mask, choices
    ).sum()

  gradient = jax.jit(jax.grad(loss))(logits)
  ranks = 3 if choices == 'all' else 1
  for g in range(G):
    real = np.nonzero(np.asarray(mask)[g])[0]
    chosen = np.asarray(routing.expert_index)[g, real, :ranks].ravel()
    f = np.bincount(chosen, minlength=E) / len(chosen)
    p = np.asarray(probs, np.float64)[g]
    expected = E / len(real) * p * (f - (p * f).sum(-1, keepdims=True))
    expected[~np.asarray(mask)[g]] = 0
    np.testing.assert_allclose(gradient[g], expected, atol=1e-6)
