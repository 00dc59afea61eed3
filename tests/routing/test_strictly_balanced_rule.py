"""Strictly balanced gating by hand, by definition, and in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing import shazeer_rules
from tests import reference

G, S, E, K = 2, 8, 4, 3


@functools.partial(jax.jit, static_argnames='num_selected')
def batchwise(logits, num_selected, mask):
  return shazeer_rules.batchwise_choice(
    logits, num_selected=num_selected, mask=mask
  )


@functools.partial(jax.jit, static_argnames='capacity')
def threshold(logits, thresholds, capacity, mask):
  return shazeer_rules.threshold_choice(
    logits, thresholds, capacity=capacity, mask=mask
  )


loss_of = jax.jit(shazeer_rules.batchwise_loss)


def by_token(chosen):
  """Gates of a routing by token, [G, S, E]."""
  chosen = jax.tree.map(np.asarray, chosen)
  gates = np.zeros((len(chosen.gate), chosen.group_size, chosen.num_experts))
  for g, e, c in np.ndindex(chosen.gate.shape):
    s = int(chosen.token_index[g, e, c])
    if s < chosen.group_size:
      gates[g, s, e] += float(chosen.gate[g, e, c])
    else:
      assert chosen.gate[g, e, c] == 0
  return gates


def log(probs):
  return np.log(np.float32(probs))[None]


TOLD = [[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]]
ALL = np.ones((1, 3), bool)


def test_masks_are_told():
  # With three tokens, two experts and K = 1 each expert takes ceil(3 / 2) = 2.
  # Expert 0 has the first two and expert 1 the last two: the middle token has
  # both.
  chosen = batchwise(log(TOLD), 1, ALL)
  np.testing.assert_allclose(
    by_token(chosen)[0], [[1, 0], [0.6, 0.4], [0, 1]], rtol=1e-6
  )
  # With thresholds of 0.65 and 0.35 the middle token has expert 1 alone, with a
  # gate of 1.
  thresholds = jnp.array([0.65, 0.35])
  threshold_routing = threshold(log(TOLD), thresholds, 3, ALL)
  np.testing.assert_allclose(
    by_token(threshold_routing)[0], [[1, 0], [0, 1], [0, 1]]
  )
  # The two choices differ in one place, by 0.6 - 0.65.
  loss = loss_of(log(TOLD), thresholds, chosen, ALL)
  np.testing.assert_allclose(loss, [(0 - 1) * (0.6 - 0.65) / 3], rtol=1e-4)
  slope = jax.grad(lambda t: loss_of(log(TOLD), t, chosen, ALL).sum())
  np.testing.assert_allclose(slope(thresholds), [1 / 3, 0], rtol=1e-6)
  agreeing = jnp.array([0.5, 0.35])
  loss = loss_of(log(TOLD), agreeing, chosen, ALL)
  assert loss == 0


def test_a_threshold_that_nobody_passes_leaves_no_expert():
  threshold_routing = threshold(log(TOLD), jnp.array([0.9, 0.35]), 1, ALL)
  # An expert with one slot takes the last token, whose gate is larger.
  np.testing.assert_array_equal(
    by_token(threshold_routing)[0], [[0, 0], [0, 0], [0, 1]]
  )


def test_gates_and_loss_are_those_of_the_book():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(G, S, E)).astype(np.float32)
  thresholds = rng.uniform(0.1, 0.4, E).astype(np.float32)
  mask = np.ones((G, S), bool)
  mask[1, 4:] = False
  args = jnp.asarray(logits), jnp.asarray(thresholds)
  chosen = batchwise(args[0], K, jnp.asarray(mask))
  threshold_routing = threshold(*args, S, jnp.asarray(mask))
  loss = np.asarray(loss_of(*args, chosen, jnp.asarray(mask)))
  filled = np.asarray(chosen.kept)
  for g in range(G):
    real = mask[g].sum()
    m = K * real // E  # a whole number here: 6 of eight tokens, 3 of four
    batch, above, expected = reference.strictly_balanced(
      np.float64(logits[g]), m, mask[g], thresholds
    )
    np.testing.assert_allclose(by_token(chosen)[g], batch, rtol=1e-5)
    np.testing.assert_allclose(by_token(threshold_routing)[g], above, rtol=1e-5)
    np.testing.assert_allclose(loss[g], expected / real, rtol=1e-4)
    assert (filled[g].sum(-1) == m).all()
    assert expected > 0


def test_gradients_reach_the_gates_through_the_renormalisation():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(G, S, E)).astype(np.float32)
  mask = np.ones((G, S), bool)
  weight = rng.normal(size=(G, E, K * S // E)).astype(np.float32)

  def total(logits):
    chosen = batchwise(logits, K, mask)
    return (chosen.gate * weight).sum()

  run = jax.jit(jax.value_and_grad(total))
  gradient = np.asarray(run(logits)[1])
  toward = rng.normal(size=logits.shape).astype(np.float32)
  up, down = (run(logits + d * toward)[0] for d in (1e-3, -1e-3))
  slope = float(up - down) / 2e-3
  assert abs(slope) > 0.1
  np.testing.assert_allclose((gradient * toward).sum(), slope, rtol=0.01)
