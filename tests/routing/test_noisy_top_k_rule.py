"""Noisy top-K: the noise, and the smooth load that is differentiable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from moe_jax import routing
from moe_jax.routing import load_loss, shazeer_rules
from moe_jax.routing.shazeer_rules import NoisyLogits
from tests import reference
from tests.models import tiny

G, S, E = 2, 7, 5
noisy_logits = jax.jit(routing.noisy_logits)
load_probability = jax.jit(shazeer_rules.load_probability, static_argnums=1)


def example(seed):
  rng = np.random.default_rng(seed)
  clean, noise = rng.normal(size=(2, G, S, E)).astype(np.float32)
  return noisy_logits(clean, noise, tiny.key(seed))


def as_float64(logits):
  return [np.asarray(x, np.float64) for x in logits]


def test_one_token_by_hand():
  # The token chooses two of three experts, and all standard deviations are 2.
  # Chosen experts 0 and 1 compete with the third value, 1; expert 2, which is
  # not chosen, competes with the second, 4. Probabilities are those of clean
  # logits.
  logits = NoisyLogits(
    clean=jnp.array([[[5.0, 3.0, 2.0]]]),
    noisy=jnp.array([[[6.0, 4.0, 1.0]]]),
    std=jnp.full((1, 1, 3), 2.0),
  )
  expected = ndtr([(5 - 1) / 2, (3 - 1) / 2, (2 - 4) / 2])
  np.testing.assert_allclose(
    load_probability(logits, 2)[0, 0], expected, rtol=1e-6
  )


@pytest.mark.parametrize('K', [1, 3, 5])
def test_load_probability_follows_the_definition(K):
  for seed in range(3):
    logits = example(seed)
    probability = load_probability(logits, K)
    assert probability.dtype == jnp.float32
    np.testing.assert_allclose(
      probability, reference.load_probability(*as_float64(logits), K), atol=1e-6
    )


def test_ties_leave_a_rival_of_the_same_height():
  # With initial weights and no noise every logit is 0, and so is its
  # competitor: each expert has a probability of one half, chosen or not.
  zeros = np.zeros((G, S, E), np.float32)
  logits = noisy_logits(zeros, zeros, None)
  np.testing.assert_allclose(load_probability(logits, 2), 0.5)


def test_noise_is_standard_normal_times_softplus():
  clean = np.full((40, 50, E), 3.0, np.float32)
  noise = np.tile(np.float32([-1.0, 0.0, 1.0, 2.0, 4.0]), (40, 50, 1))
  logits = jax.tree.map(np.asarray, noisy_logits(clean, noise, tiny.key(5)))
  std = np.log1p(np.exp(np.array([-1.0, 0.0, 1.0, 2.0, 4.0])))
  np.testing.assert_array_equal(logits.clean, clean)
  np.testing.assert_allclose(logits.std[0, 0], std, rtol=1e-6)
  unit = np.asarray((logits.noisy - clean) / logits.std)
  # Each expert has 2000 draws; tolerances are four standard errors.
  np.testing.assert_allclose(unit.mean((0, 1)), 0, atol=4 / 2000**0.5)
  np.testing.assert_allclose(unit.std((0, 1)), 1, atol=4 / 4000**0.5)
  np.testing.assert_allclose((abs(unit) < 1).mean(), 0.683, atol=0.02)


def test_no_key_no_noise_and_the_deviation_starts_at_ln_2():
  clean = np.random.default_rng(0).normal(size=(G, S, E)).astype(np.float32)
  logits = noisy_logits(clean, np.zeros((G, S, E), np.float32), None)
  np.testing.assert_array_equal(logits.noisy, clean)
  np.testing.assert_allclose(logits.std, np.log(2), rtol=1e-6)


def test_gradient_of_the_load_loss_is_the_definitions_slope():
  # The estimate exists for its gradient, which must equal the slope of the
  # plain definition through clean logits, noise and competitor.
  K, step = 2, 1e-5
  clean, noisy, std = as_float64(example(4))
  draw = (noisy - clean) / std
  noise = np.log(np.expm1(std))
  mask = np.ones((G, S), bool)
  mask[1, 4:] = False

  def by_definition(clean, noise):
    std = np.log1p(np.exp(noise))
    P = reference.load_probability(clean, clean + draw * std, std, K)
    return reference.load_loss(P, mask).sum()

  def by_code(clean, noise):
    std = jax.nn.softplus(noise)
    logits = NoisyLogits(clean, clean + jnp.asarray(draw, 'float32') * std, std)
    return load_loss(load_probability(logits, K), jnp.asarray(mask)).sum()

  inputs = (clean, noise)
  gradients = jax.jit(jax.grad(by_code, argnums=(0, 1)))(
    *[jnp.asarray(x, jnp.float32) for x in inputs]
  )
  rng = np.random.default_rng(0)
  for _ in range(3):
    toward = [rng.normal(size=clean.shape) for _ in inputs]
    up = by_definition(*[x + step * d for x, d in zip(inputs, toward)])
    down = by_definition(*[x - step * d for x, d in zip(inputs, toward)])
    along = sum((np.asarray(a) * d).sum() for a, d in zip(gradients, toward))
    np.testing.assert_allclose(along, (up - down) / (2 * step), rtol=1e-3)
  for gradient in gradients:  # every expert has a gradient
    assert (np.abs(gradient[mask]).sum(0) > 1e-3).all()
