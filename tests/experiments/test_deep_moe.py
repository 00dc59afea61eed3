"""The deep mixture of 2013: its equations, and who sits out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.gates_2013 import deep_moe, digits, training
from experiments.gates_2013.deep_moe import DeepMoe
from tests import reference


def test_one_example_by_hand():
  # Three experts got 9, 3 and 0 of twelve examples, 4 each on average. The
  # first is ahead by 5, more than the margin of 4: its gate of 0.6 becomes 0,
  # and the others share it in the ratio of their gates, 3 to 1.
  totals = jnp.array([9.0, 3.0, 0.0])
  out = deep_moe.overused(totals, 4.0)
  np.testing.assert_array_equal(out, [True, False, False])
  logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
  gates = deep_moe.constrained_gates(logits, out)
  np.testing.assert_allclose(gates, [[0.0, 0.75, 0.25]], rtol=1e-6)
  # A lead equal to the margin is allowed.
  assert not deep_moe.overused(totals, 5.0).any()
  # With the example totals are 9, 3.75 and 0.25.
  new_totals = deep_moe.moved(totals, gates.sum(0))
  mean = (9 + 3.75 + 0.25) / 3
  np.testing.assert_allclose(
    new_totals, [9 - mean, 3.75 - mean, 0.25 - mean], rtol=1e-5
  )


def test_steps_follow_the_definition():
  E, T, B, margin = 5, 30, 7, 3.0
  rng = np.random.default_rng(E)
  logits = rng.normal(np.linspace(2, 0, E), 1.0, (T, B, E)).astype(np.float32)

  @jax.jit
  def step(totals, logits):
    out = deep_moe.overused(totals, margin)
    gates = deep_moe.constrained_gates(logits, out)
    return deep_moe.moved(totals, gates.sum(0)), gates

  _, balanced_gates = jax.lax.scan(step, jnp.zeros(E), jnp.asarray(logits))
  expected = reference.balanced_gates(logits, margin)
  np.testing.assert_allclose(balanced_gates, expected, rtol=1e-4, atol=1e-6)
  assert (expected == 0).any()


def test_equal_totals_whose_mean_is_rounded_let_all_in():
  rng = np.random.default_rng(0)
  totals = jnp.tile(rng.uniform(1, 2, (200, 1)).astype(np.float32), (1, 6))
  # Six totals are equal, and yet all can be above their mean in float32.
  assert (totals > totals.mean(-1, keepdims=True)).all(-1).any()
  assert not jax.vmap(lambda row: deep_moe.overused(row, 0.0))(totals).any()


def test_totals_of_a_long_run_lose_no_gate():
  # In 40 steps of a million examples each, totals differ by half an example,
  # which a float32 sum above 2^24 cannot represent.
  mass = jnp.array([2.0**20 + 0.5, 2.0**20])
  totals = jnp.zeros(2)
  for _ in range(40):
    totals = deep_moe.moved(totals, mass)
  np.testing.assert_allclose(totals, [10.0, -10.0])


B, V, SHAPE = 6, 10, (3, 5)
MODEL = DeepMoe((3, 2), (7, 8), (9, 10))


def drawn(seed=0):
  """Random parameters, examples and classes."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(B, *SHAPE)).astype(np.float32)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)['params']
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
  )
  return params, x, rng.integers(0, V, B).astype(np.int32)


def layer(p, x):
  """sum_i g_i(x) f_i(x), one example and one expert at a time."""
  mixtures, gates = [], []
  for row in x:
    h = np.maximum(row @ p['gate_in']['kernel'] + p['gate_in']['bias'], 0)
    g = reference.softmax(h @ p['gate_out']['kernel'] + p['gate_out']['bias'])
    experts = zip(p['w_in'], p['b_in'], strict=True)
    outputs = [np.maximum(row @ w + b, 0) for w, b in experts]
    mixtures.append(
      sum(weight * out for weight, out in zip(g, outputs, strict=True))
    )
    gates.append(g)
  return np.array(mixtures), np.array(gates)


def test_it_is_the_papers_equations():
  params, x, _ = drawn()
  z1, g1 = layer(params['layer_0'], x.reshape(B, -1))
  z2, g2 = layer(params['layer_1'], z1)
  last = params['classifier']
  logits, gates = jax.jit(MODEL.apply)({'params': params}, x)
  np.testing.assert_allclose(
    logits, z2 @ last['kernel'] + last['bias'], rtol=1e-4, atol=1e-5
  )
  for found, expected in zip(gates, (g1, g2), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_an_expert_that_sits_out_has_no_gate_and_learns_nothing():
  params, x, _ = drawn()
  sit_out = [jnp.array([True, False, False]), jnp.array([False, False])]

  def total(params):
    logits, gates = MODEL.apply({'params': params}, x, sit_out)
    return (logits**2).sum(), gates

  gradient, gates = jax.jit(jax.grad(total, has_aux=True))(params)
  assert not gates[0][:, 0].any() and gates[1].all()
  np.testing.assert_allclose(gates[0].sum(-1), 1, rtol=1e-5)
  assert not gradient['layer_0']['w_in'][0].any()
  assert gradient['layer_0']['w_in'][1].any()


def test_the_constraint_holds_until_it_is_lifted():
  params, x, labels = drawn()
  batch = digits.Digits(x, labels)
  options = training.Training(margin=2.0, balance_steps=2)
  sizes = dict(num_experts=(3, 2), hidden=(7, 8), gate_hidden=(9, 10))
  options = dataclasses.replace(options, **sizes)
  step = jax.jit(training.make_step(options, optax.sgd(0.0)))
  # Expert 1 of the first layer is ahead by more than the margin all the time.
  ahead = [jnp.array([-40.0, 80.0, -40.0]), jnp.zeros(2)]
  carry = params, optax.sgd(0.0).init(params), ahead, 0
  masses = []
  for _ in range(3):
    (params, state, totals, number), mass = step(carry, batch)
    masses.append(mass)
    carry = params, state, ahead, number
  assert [mass[0][1] == 0 for mass in masses] == [True, True, False]
  np.testing.assert_allclose(masses[0][0].sum(), B, rtol=1e-5)
  # Totals move by the sums of gates, less their mean.
  np.testing.assert_allclose(totals[1], masses[2][1] - B / 2, atol=1e-5)
