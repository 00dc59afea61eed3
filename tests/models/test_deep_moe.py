"""The deep mixture of experts: its outputs, gradients and state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.layers.shared import Numerics
from moe_jax.models import DeepMoe, DeepMoeOptions, RunShape, router_state
from moe_jax.models.deep_moe import STEPS, TOTALS, GatedLayersOptions
from moe_jax.training import step as step_lib
from moe_jax.training.losses import LossWeights, normalizers
from tests.models import tiny
from tests.reference import softmax

B, V, SHAPE = 6, 4, (3, 5)
SIZES = dict(num_experts=(3, 2), hidden=(7, 8), gate_hidden=(9, 10))


def options(**layers) -> DeepMoeOptions:
  if layers.get('balance_steps'):
    layers = {'margin': 2.0, **layers}
  layers = GatedLayersOptions(**{**SIZES, **layers})
  return DeepMoeOptions(vocab_size=V, feature_shape=SHAPE, deep_moe=layers)


def build(**layers) -> DeepMoe:
  return options(**layers).build()


def features(seed=0):
  return np.random.default_rng(seed).normal(size=(B, *SHAPE)).astype(np.float32)


def layer(p, x):
  """sum_i g_i(x) f_i(x), one example and one expert at a time."""
  mixtures, gates = [], []
  for row in x:
    h = np.maximum(row @ p['gate_in']['kernel'] + p['gate_in']['bias'], 0)
    g = softmax(h @ p['gate_out']['kernel'] + p['gate_out']['bias'])
    experts = zip(p['w_in'], p['b_in'], strict=True)
    outputs = [np.maximum(row @ w + b, 0) for w, b in experts]
    mixtures.append(
      sum(weight * out for weight, out in zip(g, outputs, strict=True))
    )
    gates.append(g)
  return np.array(mixtures), np.array(gates)


def test_it_is_the_papers_equations():
  model = build()
  params = tiny.params_of(model)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  x = features()
  z1, g1 = layer(p['layer_0'], x.reshape(B, -1).astype(np.float64))
  z2, g2 = layer(p['layer_1'], z1)
  expected = z2 @ p['classifier']['kernel'] + p['classifier']['bias']
  mask = np.array([1, 1, 0, 1, 0, 1])
  apply = jax.jit(functools.partial(model.apply, mutable=['intermediates']))
  (logits, aux), state = apply({'params': params}, x, mask[:, None])
  np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-4, atol=1e-5)
  for i, g in enumerate((g1, g2)):
    gates = state['intermediates'][f'layer_{i}']['gates'][0]
    np.testing.assert_allclose(gates, g, rtol=1e-4, atol=1e-6)
  # Loads are sums over examples that are not padding, padded to the larger E.
  loads = [mask @ g1, [*(mask @ g2), 0.0]]
  np.testing.assert_allclose(aux.stats.load, loads, rtol=1e-4)
  np.testing.assert_array_equal(aux.stats.tokens, [4, 4])


def test_one_expert_is_a_plain_network():
  model = build(num_experts=(1, 1))
  params = tiny.params_of(model)
  x = jnp.asarray(features())

  def plain(params):
    h = x.reshape(B, -1)
    for name in ('layer_0', 'layer_1'):
      h = nn.relu(h @ params[name]['w_in'][0] + params[name]['b_in'])
    p = params['classifier']
    return h @ p['kernel'] + p['bias'][None]

  def mixed(params):
    return model.apply({'params': params}, x)[0][:, 0]

  for function, argument in ((mixed, params), (plain, params)):
    value = jax.value_and_grad(lambda p, f=function: (f(p) ** 2).sum())
    results = jax.jit(value)(argument)
    if function is mixed:
      mixed_results = results
  np.testing.assert_allclose(mixed_results[0], results[0], rtol=1e-5)
  tiny.assert_trees_close(mixed_results[1], results[1], rtol=1e-4, atol=1e-5)


def batch_loss(model, params, state, x, targets):
  logits, aux = model.apply(
    router_state.variables(params, state), x, train=True
  )
  losses = model.loss(logits, {'targets': targets})
  return losses.nats.mean(), aux


def targets(seed=1):
  return np.random.default_rng(seed).integers(0, V, (B, 1)).astype(np.int32)


@pytest.mark.parametrize(
  'balance_steps', [pytest.param(0, marks=pytest.mark.slow), -1]
)
def test_gradients_are_finite_differences(balance_steps):
  model = build(balance_steps=balance_steps)
  params, state = tiny.params_of(model), {}
  if balance_steps:
    state = router_state.init_router_state(model)
    state['layer_0'][TOTALS] = jnp.array([9.0, -4.0, -5.0])
  x, y = jnp.asarray(features()), jnp.asarray(targets())
  loss = jax.jit(lambda p: batch_loss(model, p, state, x, y)[0])
  gradient = jax.device_get(jax.jit(jax.grad(loss))(params))
  params = jax.device_get(params)
  rng = np.random.default_rng(0)
  for name in ('layer_0', 'layer_1', 'classifier'):
    # The derivative is taken along a random direction of each layer's
    # parameters.
    direction = jax.tree.map(np.zeros_like, params)
    direction[name] = jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
      params[name],
    )
    step = 4e-4

    def loss_at(t, direction=direction):
      shifted_params = jax.tree.map(lambda p, d: p + t * d, params, direction)
      return float(loss(shifted_params))

    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
    np.testing.assert_allclose(
      sum(jax.tree.leaves(products)), slope, rtol=1e-2, atol=2e-3
    )
  # An expert that sits out has no gradient, and neither has its column of the
  # gate.
  layer = gradient['layer_0']
  sat_out = not np.abs(layer['w_in'][0]).max()
  assert sat_out == (balance_steps == -1)
  assert np.abs(layer['w_in'][1]).max() > 0


def test_the_constraint_holds_until_it_is_lifted_and_in_training_alone():
  model = build(balance_steps=2)
  params = tiny.params_of(model)
  free, state = build(), router_state.init_router_state(model)
  x, y = jnp.asarray(features()), jnp.asarray(targets())
  step = jax.jit(functools.partial(batch_loss, model))
  expected = jax.jit(functools.partial(batch_loss, free))(params, {}, x, y)
  loads = []
  # Before every step expert 1 of the first layer is ahead by more than the
  # margin.
  ahead = {TOTALS: jnp.array([-4.0, 9.0, -5.0])}
  for _ in range(3):
    loss, aux = step(params, state | {'layer_0': ahead}, x, y)
    loads.append(np.asarray(aux.stats.load))
    state = model.move_router_state(state, aux.stats.load)
  assert [load[0, 1] == 0 for load in loads] == [True, True, False]
  np.testing.assert_allclose(loads[0].sum(-1), B, rtol=1e-5)
  np.testing.assert_allclose(loads[2], expected[1].stats.load, rtol=1e-5)
  np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
  start = router_state.init_router_state(model) | {'layer_0': ahead}
  _, aux = jax.jit(model.apply)(router_state.variables(params, start), x)
  np.testing.assert_allclose(aux.stats.load, expected[1].stats.load, rtol=1e-5)


def test_totals_move_by_each_layers_load():
  model = build(balance_steps=-1)
  state = router_state.init_router_state(model)
  # The second layer has two experts, and its load is padded.
  load = jnp.array([[6.0, 0.0, 0.0], [1.0, 5.0, 0.0]])
  for _ in range(2):
    state = model.move_router_state(state, load)
  assert state[STEPS] == 2 and state[STEPS].dtype == jnp.int32
  np.testing.assert_allclose(state['layer_0'][TOTALS], [8, -4, -4])
  np.testing.assert_allclose(state['layer_1'][TOTALS], [-4, 4])
  assert router_state.init_router_state(build()) == {}


@pytest.mark.slow
def test_a_step_moves_totals_by_the_whole_batch():
  model = build(balance_steps=-1)
  params = tiny.params_of(model)
  real = np.array([1, 1, 1, 0, 1, 1])[:, None]
  batch = {
    'features': jnp.asarray(features()),
    'targets': jnp.asarray(targets()),
    'segment_ids': jnp.asarray(real, jnp.int32),
    'loss_weights': jnp.asarray(real, jnp.float32),
  }
  first_state = router_state.init_router_state(model)
  _, aux = jax.jit(model.apply)(
    router_state.variables(params, first_state), **model.inputs(batch)
  )
  load = np.asarray(aux.stats.load)
  optimizer = optax.sgd(0.1)
  for microbatches in (1, 2):
    step = jax.jit(
      functools.partial(
        step_lib.train_step,
        grad_fn=step_lib.make_grad_fn(model, LossWeights(), microbatches),
        optimizer=optimizer,
        rate=optax.constant_schedule(0.1),
        normalize=functools.partial(normalizers, model),
        move_router_state=model.move_router_state,
      )
    )
    state = step_lib.state_of(
      jnp.uint32(0), params, optimizer=optimizer, router_state=first_state
    )
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics.sums.aux.stats.tokens, [5, 5])
    new_state = state.router_state
    assert new_state[STEPS] == 1
    for row, name, E in zip(load, ('layer_0', 'layer_1'), (3, 2), strict=True):
      expected = row[:E] - row[:E].mean()
      np.testing.assert_allclose(new_state[name][TOTALS], expected, atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(hidden=(7,)), r'hidden=\(7,\) and num_experts=\(3, 2\)'),
    (dict(num_experts=(3, 0)), r'num_experts=\(3, 0\).*must be at least 1'),
    (dict(margin=-1.0, balance_steps=-1), 'margin=-1.0 must be at least 0'),
    (dict(margin=2.0), 'margin=2.0 has no effect unless balance_steps'),
    (dict(balance_steps=-2), 'balance_steps=-2 must be at least -1'),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    build(**changes)


def test_what_the_data_decides_is_filled_in():
  empty = dataclasses.replace(options(), vocab_size=0, feature_shape=())
  assert empty.filled(V, SHAPE, 1) == options()
  with pytest.raises(ValueError, match=r'vocab_size=0: 0 stands for'):
    empty.build()
  with pytest.raises(ValueError, match=r'feature_shape=\(\): \(\) stands for'):
    dataclasses.replace(options(), feature_shape=()).build()
  with pytest.raises(ValueError, match=r'feature_shape=\(3, 5\) is not that'):
    options().filled(V, (2,), 1)


def test_it_has_one_type_of_numbers():
  bfloat16 = Numerics(dtype='bfloat16')
  with pytest.raises(ValueError, match=r"numerics.dtype='bfloat16' has no"):
    dataclasses.replace(options(), numerics=bfloat16)
  int8_kernels = Numerics(kernels=KernelFormat('int8'))
  with pytest.raises(ValueError, match=r"numerics.kernels.name='int8' has no"):
    dataclasses.replace(options(), numerics=int8_kernels)


def test_a_constraint_that_outlives_the_run_is_refused():
  (problem,) = options(balance_steps=2000).problems_in(RunShape(300, 6, 1, 1))
  assert 'balance_steps=2000 > total_steps=300' in problem
  for steps in (300, -1, 0):
    assert not [
      *options(balance_steps=steps).problems_in(RunShape(300, 6, 1, 1))
    ]
