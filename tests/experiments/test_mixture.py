"""The three errors of 1991, by hand, and their published gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.origins_1991 import mixture
from experiments.origins_1991.mixture import LOSSES, Mixture

N, E, V = 3, 4, 2
loss_of = {name: jax.jit(function) for name, function in LOSSES.items()}
gradients_of = {
  name: jax.jit(
    jax.grad(lambda o, x, d, f=function: f(o, x, d).sum(), argnums=(0, 1))
  )
  for name, function in LOSSES.items()
}
each_loss = pytest.mark.parametrize('loss', LOSSES)


def case(seed=0, spread=1.5):
  """Random outputs, gate logits and targets."""
  rng = np.random.default_rng(seed)
  outputs = rng.normal(0, spread, (N, E, V))
  return outputs, rng.normal(0, 1, (N, E)), rng.normal(0, 1, (N, V))


def by_hand(loss, outputs, gate_logits, targets):
  """The errors, and the published gradients, in a loop over cases, float64."""
  losses, of_outputs, of_logits = [], [], []
  for o, x, d in zip(outputs, gate_logits, targets, strict=True):
    p = np.exp(x) / np.exp(x).sum()
    distances = ((d - o) ** 2).sum(-1)
    blended = sum(p[i] * o[i] for i in range(E))
    if loss == 'cooperative':
      losses.append(((d - blended) ** 2).sum())
      of_outputs.append(-2 * p[:, None] * (d - blended))
      of_logits.append(-2 * p * ((d - blended) * (o - blended)).sum(-1))
    elif loss == 'gated':
      losses.append(p @ distances)
      of_outputs.append(-2 * p[:, None] * (d - o))
      of_logits.append(p * (distances - losses[-1]))
    else:
      joint = p * np.exp(-distances / 2)
      h = joint / joint.sum()
      losses.append(-np.log(joint.sum()))
      of_outputs.append(-h[:, None] * (d - o))
      of_logits.append(p - h)
  return map(np.array, (losses, of_outputs, of_logits))


@each_loss
def test_errors_and_gradients_are_the_published_ones(loss):
  expected, *published = by_hand(loss, *case())
  values = [jnp.asarray(value, jnp.float32) for value in case()]
  np.testing.assert_allclose(loss_of[loss](*values), expected, rtol=1e-5)
  for found, by_paper in zip(gradients_of[loss](*values), published):
    np.testing.assert_allclose(found, by_paper, rtol=2e-5, atol=2e-6)


def test_far_targets_stay_finite():
  # exp(-||d - o||^2 / 2) is 0 in float32, but the log of the sum is finite.
  example = jnp.array([[[0.0], [1.0]]]), jnp.zeros((1, 2)), jnp.array([[30.0]])
  # The nearer expert has all of the posterior.
  np.testing.assert_allclose(
    loss_of['competitive'](*example), [29.0**2 / 2 + np.log(2)], rtol=1e-6
  )
  assert jnp.isfinite(gradients_of['competitive'](*example)[1]).all()


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


def test_a_mixture_is_a_loop_over_its_experts():
  shapes = dict(
    expert_in=(E, 5, 6),
    expert_in_bias=(E, 6),
    expert_out=(E, 6, V),
    expert_out_bias=(E, V),
    gate_out=(5, E),
    gate_out_bias=(E,),
  )
  rng = np.random.default_rng(3)
  w = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
  x = rng.normal(size=(N, 5)).astype(np.float32)
  model = Mixture(E, expert_hidden=6, output='softmax', num_outputs=V)
  outputs = jax.jit(model.apply)({'params': w}, x)
  for n in range(N):
    p = softmax(x[n] @ w['gate_out'] + w['gate_out_bias'])
    experts = []
    for i in range(E):
      hidden = x[n] @ w['expert_in'][i] + w['expert_in_bias'][i]
      o = (1 / (1 + np.exp(-hidden))) @ w['expert_out'][i]
      experts.append(softmax(o + w['expert_out_bias'][i]))
    tolerance = dict(rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(outputs.experts[n], experts, **tolerance)
    np.testing.assert_allclose(outputs.gate_probs[n], p, **tolerance)
    np.testing.assert_allclose(outputs.prediction[n], p @ experts, **tolerance)


def test_what_a_linear_expert_says():
  # Weights are 1 and 2, the input is (1, 0.5) and the bias 1: the output is 3,
  # or the logistic of 3; a softmax over one output is always 1.
  params = {
    'expert_out': jnp.array([[[1.0], [2.0]]]),
    'expert_out_bias': jnp.array([[1.0]]),
    'gate_out': jnp.ones((2, 1)),
    'gate_out_bias': jnp.ones(1),
  }
  x = jnp.array([[1.0, 0.5]])
  for output, expected in (('linear', 3.0), ('logistic', 0.9526)):
    y = Mixture(1, output=output).apply({'params': params}, x).prediction
    np.testing.assert_allclose(y, [[expected]], atol=1e-4)


def test_it_starts_with_equal_proportions_and_different_experts():
  x = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
  model = Mixture(E, num_outputs=V)
  outputs, variables = jax.jit(model.init_with_output)(jax.random.key(1), x)
  np.testing.assert_array_equal(outputs.gate_probs, np.full((N, E), 1 / E))
  experts = np.asarray(outputs.experts)
  assert all((experts[:, 0] != experts[:, i]).all() for i in range(1, E))
  largest = max(abs(leaf).max() for leaf in jax.tree.leaves(variables))
  assert 0.4 < largest <= mixture.INIT_SCALE
