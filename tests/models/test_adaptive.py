"""The three errors of 1991, by hand, and their published gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models import adaptive_errors as errors
from moe_jax.models.adaptive import AdaptiveOptions, MixtureOptions

N, E, V = 3, 4, 2
LOSSES = sorted(errors.LOSSES)
loss_of = {name: jax.jit(function) for name, function in errors.LOSSES.items()}
gradients_of = {
  name: jax.jit(function) for name, function in errors.GRADIENTS.items()
}
posterior_of = jax.jit(errors.posterior)
each_loss = pytest.mark.parametrize('loss', LOSSES)


def mixture(classes, shape, **options):
  options = MixtureOptions(**options)
  return AdaptiveOptions(classes, shape, options).build()


def case(seed=0, spread=1.5):
  """Random outputs, gate logits and targets."""
  rng = np.random.default_rng(seed)
  outputs = rng.normal(0, spread, (N, E, V))
  return outputs, rng.normal(0, 1, (N, E)), rng.normal(0, 1, (N, V))


def arrays(values):
  return [jnp.asarray(value, jnp.float32) for value in values]


def by_hand(loss, outputs, gate_logits, targets):
  """The errors by definition, in a loop over cases and experts, in float64."""
  losses = []
  for o, x, d in zip(outputs, gate_logits, targets, strict=True):
    p = np.exp(x) / np.exp(x).sum()
    if loss == 'cooperative':
      blended = sum(p[i] * o[i] for i in range(len(p)))
      losses.append(((d - blended) ** 2).sum())
    elif loss == 'gated':
      losses.append(sum(p[i] * ((d - o[i]) ** 2).sum() for i in range(len(p))))
    else:
      terms = [p[i] * np.exp(-((d - o[i]) ** 2).sum() / 2) for i in range(E)]
      losses.append(-np.log(sum(terms)))
  return np.array(losses)


def test_told():
  # Two experts have equal proportions, and the target is 1. The outputs are 1
  # and 3, so that their weighted sum is 2.
  outputs = jnp.array([[[1.0], [3.0]]])
  logits, targets = jnp.zeros((1, 2)), jnp.array([[1.0]])
  example = outputs, logits, targets
  # The weighted sum is wrong by 1.
  np.testing.assert_allclose(loss_of['cooperative'](*example), [1.0])
  # A drawn expert is wrong by 2 half of the time.
  np.testing.assert_allclose(loss_of['gated'](*example), [2.0])
  # The likelihood is exp(0) / 2 + exp(-2) / 2.
  expected = -np.log((1 + np.exp(-2.0)) / 2)
  np.testing.assert_allclose(loss_of['competitive'](*example), [expected])
  # The posterior of the first expert is 1 / (1 + exp(-2)) = 0.881.
  posterior = posterior_of(*example)
  np.testing.assert_allclose(posterior, [[0.8808, 0.1192]], atol=1e-4)


def test_who_is_moved_by_whose_error():
  # Outputs are as above. The first expert is right, and only the cooperative
  # error changes it, to make up for the second.
  example = jnp.array([[[1.0], [3.0]]]), jnp.zeros((1, 2)), jnp.array([[1.0]])
  gradients = {
    loss: gradients_of[loss](*example).expert_outputs[0, :, 0].tolist()
    for loss in LOSSES
  }
  assert gradients['cooperative'] == [1.0, 1.0]
  assert gradients['gated'] == [0.0, 2.0]
  np.testing.assert_allclose(
    gradients['competitive'], [0, 2 * 0.1192], atol=1e-4
  )


@each_loss
def test_losses_are_their_definitions(loss):
  losses = loss_of[loss](*arrays(case()))
  np.testing.assert_allclose(losses, by_hand(loss, *case()), rtol=1e-5)


@each_loss
def test_gradients_are_the_published_ones(loss):
  outputs, logits, targets = arrays(case())

  def total(o, x):
    return errors.LOSSES[loss](o, x, targets).sum()

  by_autodiff = jax.jit(jax.grad(total, argnums=(0, 1)))(outputs, logits)
  published = gradients_of[loss](outputs, logits, targets)
  for gradient, expected in zip(published, by_autodiff, strict=True):
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-6)


@each_loss
@pytest.mark.parametrize('argument', ['expert_outputs', 'gate_logits'])
def test_gradients_are_finite_differences(loss, argument):
  values = case(seed=1)
  gradient = getattr(gradients_of[loss](*arrays(values)), argument)
  position = ('expert_outputs', 'gate_logits').index(argument)
  step, differences = 1e-5, np.zeros_like(values[position])
  for index in np.ndindex(*differences.shape):
    sums = []
    for sign in (1, -1):
      shifted_values = [value.copy() for value in values]
      shifted_values[position][index] += sign * step
      sums.append(by_hand(loss, *shifted_values).sum())
    differences[index] = (sums[0] - sums[1]) / (2 * step)
  np.testing.assert_allclose(gradient, differences, rtol=1e-4, atol=1e-5)


def test_competition_moves_the_best_fitting_expert_fastest():
  # This is the paper's argument for equation 1.3: with equal proportions and
  # all distances above 1, equation 1.4 moves the nearest expert least and
  # equation 1.5 moves it most.
  outputs = jnp.array([[[1.1], [1.5], [2.0]]])
  example = outputs, jnp.zeros((1, 3)), jnp.zeros((1, 1))
  gated = gradients_of['gated'](*example).expert_outputs[0, :, 0]
  competitive = gradients_of['competitive'](*example).expert_outputs[0, :, 0]
  assert gated.argmin() == 0 and gated.argmax() == 2
  assert competitive.argmax() == 0 and competitive.argmin() == 2


def test_posterior_is_what_competition_learns_from():
  # The gradient is -h_i (d - o_i), with the posterior h computed in a loop.
  outputs, logits, targets = case(seed=2)
  h = np.zeros((N, E))
  for n in range(N):
    p = np.exp(logits[n]) / np.exp(logits[n]).sum()
    for i in range(E):
      h[n, i] = p[i] * np.exp(-((targets[n] - outputs[n, i]) ** 2).sum() / 2)
    h[n] /= h[n].sum()
  np.testing.assert_allclose(
    posterior_of(*arrays((outputs, logits, targets))), h, rtol=1e-5
  )
  gradients = gradients_of['competitive'](*arrays((outputs, logits, targets)))
  expected = -h[..., None] * (targets[:, None] - outputs)
  np.testing.assert_allclose(gradients.expert_outputs, expected, rtol=1e-4)


def test_far_targets_stay_finite():
  # exp(-||d - o||^2 / 2) is 0 in float32, but the log of the sum is finite.
  example = jnp.array([[[0.0], [1.0]]]), jnp.zeros((1, 2)), jnp.array([[30.0]])
  # The nearer expert has all of the posterior.
  expected = 29.0**2 / 2 + np.log(2)
  np.testing.assert_allclose(
    loss_of['competitive'](*example), [expected], rtol=1e-6
  )
  assert jnp.isfinite(gradients_of['competitive'](*example).gate_logits).all()


def weights(**shapes):
  rng = np.random.default_rng(3)
  return {
    k: jnp.asarray(rng.normal(size=v), jnp.float32) for k, v in shapes.items()
  }


def logistic(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


def test_mixture_is_a_loop_over_its_experts():
  model = mixture(V, (5,), num_experts=E, expert_hidden=6, gate_hidden=3)
  params = weights(
    expert_in=(E, 5, 6),
    expert_in_bias=(E, 6),
    expert_out=(E, 6, V),
    expert_out_bias=(E, V),
    gate_in=(5, 3),
    gate_in_bias=(3,),
    gate_out=(3, E),
    gate_out_bias=(E,),
  )
  x = np.random.default_rng(4).normal(size=(N, 5)).astype(np.float32)
  outputs, _ = jax.jit(model.apply)({'params': params}, x)

  w = {name: np.asarray(value, np.float64) for name, value in params.items()}
  for n in range(N):
    hidden = logistic(x[n] @ w['gate_in'] + w['gate_in_bias'])
    p = softmax(hidden @ w['gate_out'] + w['gate_out_bias'])
    expert_outputs = []
    for i in range(E):
      hidden = logistic(x[n] @ w['expert_in'][i] + w['expert_in_bias'][i])
      o = hidden @ w['expert_out'][i] + w['expert_out_bias'][i]
      expert_outputs.append(softmax(o))
    tolerance = dict(rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
      outputs.expert_outputs[n], expert_outputs, **tolerance
    )
    np.testing.assert_allclose(outputs.gate_probs[n], p, **tolerance)
    np.testing.assert_allclose(
      outputs.prediction[n], p @ expert_outputs, **tolerance
    )


@pytest.mark.parametrize(
  ('output', 'expected'),
  [('linear', 3.0), ('logistic', 0.9526), ('softmax', 1.0)],
)
def test_what_a_linear_expert_says(output, expected):
  # Weights are 1 and 2, the input is (1, 0.5) and the bias 1: the output is 3,
  # or the logistic of 3; a softmax over one output is always 1.
  model = mixture(1, (2,), num_experts=1, expert_output=output)
  params = {
    'expert_out': jnp.array([[[1.0], [2.0]]]),
    'expert_out_bias': jnp.array([[1.0]]),
    'gate_out': jnp.ones((2, 1)),
    'gate_out_bias': jnp.ones(1),
  }
  outputs, _ = model.apply({'params': params}, jnp.array([[1.0, 0.5]]))
  np.testing.assert_allclose(outputs.prediction, [[expected]], atol=1e-4)


def initial_outputs(model, x):
  """The outputs of a model before its first step."""
  run = jax.jit(lambda key, x: model.init_with_output(key, x)[0])
  return run(jax.random.key(1), x)[0]


def test_it_starts_with_equal_proportions_and_different_experts():
  model = mixture(V, (2, 3), num_experts=E)
  x = np.random.default_rng(0).normal(size=(N, 2, 3)).astype(np.float32)
  outputs = initial_outputs(model, x)
  np.testing.assert_array_equal(outputs.gate_probs, np.full((N, E), 1 / E))
  expert_outputs = np.asarray(outputs.expert_outputs)
  assert all(
    (expert_outputs[:, 0] != expert_outputs[:, i]).all() for i in range(1, E)
  )


def test_targets_are_one_at_their_class():
  models = {loss: mixture(3, (2,), loss=loss, num_experts=E) for loss in LOSSES}
  x = np.random.default_rng(5).normal(size=(2, 2)).astype(np.float32)
  outputs = initial_outputs(models['gated'], x)
  host_outputs = [np.asarray(array, float) for array in outputs[:2]]
  for loss, model in models.items():
    model_loss = jax.jit(model.loss)(outputs, {'targets': np.array([[2], [0]])})
    assert model_loss.logits_z is None
    expected = by_hand(loss, *host_outputs, np.array([[0, 0, 1], [1, 0, 0]]))
    np.testing.assert_allclose(model_loss.nats[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(loss='gate'), "unknown loss 'gate'; did you mean 'gated'"),
    (dict(num_experts=0), 'num_experts=0 must be at least 1'),
    (dict(expert_hidden=-1), 'expert_hidden=-1 must be at least 0'),
    (dict(expert_output='relu'), "expert_output 'relu'; .*'logistic'"),
    (dict(init_scale=0.0), 'init_scale=0.0 must be above 0'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    mixture(4, (2,), **options)
