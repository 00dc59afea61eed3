"""Layers whose experts are chosen evenly, whatever the logits are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.experts import FeedForwardExpert
from moe_jax.layers.moe import MoE
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.routers import TokenChoice
from moe_jax.routing.capacity import PerAssignment
from moe_jax.routing.rules_without_logits import forced_choices
from tests import reference
from tests.models import tiny
from tests.models.tiny import draw

G, S, E, K, M = 4, 10, 5, 2, 6
EVEN = MoeOptions(
  E,
  K,
  router=TokenChoice(gates='renormalized'),
  capacity=PerAssignment(factor=1.0),
  force_balance='round_robin',
)


@functools.cache
def compiled(options, train):
  layer = MoE(options)
  params = tiny.layer_params(layer, draw(G, S, M))

  @jax.jit
  def apply(x, mask, key):
    rngs = {'router': key} if train else None
    return layer.apply({'params': params}, x, mask, train, rngs=rngs)

  return apply


def run(options, mask=None, key=None):
  mask = np.ones((G, S), bool) if mask is None else mask
  apply = compiled(options, key is not None)
  return apply(draw(G, S, M), jnp.asarray(mask), tiny.key(key or 0))


def test_in_turn_no_expert_has_more_than_its_share():
  _, aux = run(EVEN)
  np.testing.assert_array_equal(aux.stats.load, [G * S * K // E] * E)
  assert aux.stats.overflowed.sum() == 0 and aux.stats.unsent.sum() == 0
  mask = np.random.default_rng(1).random((G, S)) < 0.6
  _, aux = run(EVEN, mask)
  assert aux.stats.load.sum() == mask.sum() * K
  assert aux.stats.overflowed.sum() == 0
  # Chosen by logits, the same tokens do not fit.
  by_logits = dataclasses.replace(EVEN, force_balance='')
  assert run(by_logits)[1].stats.overflowed.sum() > 0


def test_gates_and_gradients_are_those_of_the_logits():
  """Each token's output is told by hand from the experts whose turn it is."""
  options = dataclasses.replace(
    EVEN,
    router=TokenChoice(gates='raw'),
    expert=FeedForwardExpert(hidden=7, activation='relu'),
  )
  x = draw(1, 2, M)
  layer = MoE(options)
  params = tiny.layer_params(layer, x)
  probs = reference.softmax((x @ params['router']['w'])[0])

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def output(params):
    y = layer.apply({'params': params}, jnp.asarray(x))[0]
    return y.sum(), y

  (_, y), grads = output(params)
  kernels = params['experts']
  for token, experts in enumerate([(0, 1), (2, 3)]):
    expected = sum(
      probs[token, e]
      * (np.maximum(x[0, token] @ kernels['w_in'][e], 0) @ kernels['w_out'][e])
      for e in experts
    )
    np.testing.assert_allclose(y[0, token], expected, rtol=1e-5, atol=1e-6)
  assert np.abs(grads['router']['w']).max() > 1e-3


def test_random_choices_are_new_in_training_and_fixed_in_evaluation():
  options = dataclasses.replace(EVEN, force_balance='random')
  first, repeated, other = (run(options, key=key)[0] for key in (1, 1, 2))
  np.testing.assert_array_equal(first, repeated)
  assert (first != other).any()
  np.testing.assert_array_equal(run(options)[0], run(options)[0])
  # Layers of a stack differ.

  @jax.jit
  def chosen(layer):
    mask = jnp.ones((G, S), bool)
    return forced_choices('random', mask, E, K, layer, None).expert

  choices = [np.asarray(chosen(layer)) for layer in (0, 0, 1)]
  np.testing.assert_array_equal(choices[0], choices[1])
  assert (choices[0] != choices[2]).any()
  # In turn, the number of a layer is its first expert.
  in_turn = forced_choices('round_robin', jnp.ones((1, 2), bool), E, K, 3, None)
  assert in_turn.expert.tolist() == [[[3, 4], [0, 1]]]
