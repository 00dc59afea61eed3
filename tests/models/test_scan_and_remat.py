"""Scanning over layers and recomputing them change no number."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.extend import core

from moe_jax import ExpertChoice, Hash, NoisyTopK, Random, TokenChoice, models
from moe_jax.layers.experts import Dropless
from moe_jax.layers.positions import NoPositions
from moe_jax.routing.capacity import All
from tests.models import tiny

# Dropout, jitter and sampled second choices are used, and capacity binds.
MOE = dict(
  router=TokenChoice(gates='renormalized', jitter=0.1, second_policy='sampled')
)
ROUTERS = {
  'sampled': MOE,
  'dropless': MOE | dict(dispatch=Dropless(), capacity=All()),
  'expert_choice': dict(
    router=ExpertChoice(jitter=0.1), allow_future_leak=True
  ),
  'hash': dict(router=Hash(of='bigram')),
}


def build(scan_layers=True, remat='none', router='sampled'):
  options = dict(scan_layers=scan_layers, remat=remat)
  return tiny.build(ROUTERS[router], dropout=0.1, **options)


@functools.cache
def trained(scan_layers, remat, router='sampled'):
  """Computes (((loss, logits), gradient) of a training step, its FLOPs)."""
  model = build(scan_layers, remat, router)
  tokens = tiny.tokens()

  def loss(params, router_key, dropout_key):
    rngs = {'router': router_key, 'dropout': dropout_key}
    logits, aux = model.apply(
      {'params': params}, jnp.asarray(tokens), train=True, rngs=rngs
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    losses = sum(loss.sum() for loss in aux.losses.values())
    return nats.mean() + 0.1 * losses, logits

  params = tiny.params_of(build(router=router))
  args = (params, tiny.key(0), tiny.key(1))
  step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*args).compile()
  return step(*args), step.cost_analysis()['flops']


@pytest.mark.parametrize(
  ('scan_layers', 'remat', 'router'),
  [
    pytest.param(False, 'none', 'hash', marks=pytest.mark.as_users_compile),
    pytest.param(
      *(True, 'dots', 'dropless'),
      marks=[pytest.mark.slow, pytest.mark.as_users_compile],
    ),
    pytest.param(True, 'full', 'expert_choice', marks=pytest.mark.slow),
    (True, 'save=rows,hidden', 'sampled'),
  ],
)
def test_loss_logits_and_gradients_equal_the_plain_loop(
  scan_layers, remat, router
):
  plain = build(router=router)
  assert build(scan_layers, remat, router) != plain
  (value, grads), _ = trained(scan_layers, remat, router)
  (plain_value, plain_grads), _ = trained(True, 'none', router)
  tiny.assert_trees_close(value, plain_value, rtol=1e-5, atol=1e-5)
  tiny.assert_trees_close(grads, plain_grads, rtol=1e-4, atol=1e-5)
  for name, leaf in tiny.leaves(grads).items():
    assert np.abs(leaf).max() > 1e-4, name


def equations(jaxpr, counts=None):
  """Counts of each primitive in a jaxpr, with all nested ones."""
  counts = collections.Counter() if counts is None else counts
  for equation in jaxpr.eqns:
    counts[equation.primitive.name] += 1
    for inner in core.jaxprs_in_params(equation.params):
      equations(inner, counts)
  return counts


@functools.cache
def equations_of_gradient(dispatch, remat):
  model = tiny.build(ROUTERS.get(dispatch, MOE), remat=remat)

  def loss(params):
    rngs = {'router': tiny.key(0)}
    logits, _ = model.apply(
      {'params': params}, jnp.asarray(tiny.tokens()), train=True, rngs=rngs
    )
    return logits.sum()

  params = models.abstract_params(model)
  return equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)


@pytest.mark.parametrize(
  ('remat', 'dispatch'),
  [
    ('full', 'gather'),
    pytest.param('dots', 'dropless', marks=pytest.mark.slow),
    pytest.param('full', 'expert_choice', marks=pytest.mark.slow),
  ],
)
def test_the_backward_pass_does_not_route_again(remat, dispatch):
  names = ('none', remat)
  counts = {name: equations_of_gradient(dispatch, name) for name in names}
  repeated = counts[remat] - counts['none']
  assert counts['none']['top_k'] > 0
  assert (counts['none']['cumsum'] > 0) == (dispatch != 'expert_choice')
  decisions = ['top_k', 'sort']
  # Products of sorted rows compute block indices too.
  if dispatch != 'dropless':
    decisions += ['cumsum', 'scatter']
  for decision in decisions:
    assert not repeated[decision], decision
  # The layer does run again, with its noise. What 'dots' keeps, including the
  # loops over blocks, does not run again.
  assert repeated['dot_general'] > 0 and repeated['random_bits'] > 0
  if dispatch == 'dropless':
    assert (repeated['while'] > 0) == (remat == 'full')


def test_only_the_loop_is_a_loop():
  # XLA counts a loop's body once, and two unrolled layers twice.
  looped, plain = (trained(scan, 'none', 'hash')[1] for scan in (True, False))
  assert plain > 1.4 * looped


LSTM = dict(kind='lstm', positions=NoPositions())


@pytest.mark.parametrize(
  ('router', 'options'),
  [
    (Hash(), {}),
    (Random(), dict(scan_layers=False)),
    (NoisyTopK(), {}),
    (Random(), LSTM),
  ],
)
def test_every_layer_draws_for_itself(router, options):
  model = tiny.build(dict(router=router, capacity=All()), **options)
  # Weights of routers are zero, so that only noise decides.
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: 0 * x if 'router' in str(path) else x, tiny.params_of(model)
  )
  rngs = {'router': tiny.key(0)}
  run = jax.jit(
    lambda p, x: model.apply({'params': p}, x, train=True, rngs=rngs)
  )
  load = np.asarray(run(params, tiny.tokens())[1].stats.load)
  assert (load[0] != load[1]).any()


@pytest.mark.as_users_compile
@pytest.mark.slow
def test_a_loop_starts_as_the_unrolled_layers_do():
  boxed = {
    scan: jax.jit(build(scan).init)(tiny.key(3), tiny.tokens())
    for scan in (True, False)
  }
  loop, unrolled = (nn.meta.unbox(boxed[scan]) for scan in (True, False))
  tiny.assert_trees_close(loop, unrolled, rtol=1e-6, atol=1e-7)
  assert jax.tree.structure(boxed[True]) == jax.tree.structure(boxed[False])
  # The two layers have different initial values.
  for name, leaf in tiny.leaves(loop['params']['layers']).items():
    if not name.endswith('scale'):
      leaf = np.asarray(leaf)
      assert np.abs(leaf[0] - leaf[1]).max() > 0.01, name


def test_periods_are_stacked_under_their_own_axis():
  model = tiny.build(num_layers=4, moe=dict(layers='every 2'))
  params = models.abstract_params(model)['layers']
  w_in = params['layer_1']['moe']['experts']['w_in']
  assert w_in.names == ('layers', 'expert', 'embed', 'expert_mlp')
  assert w_in.value.shape == (2, 5, 12, 20)
