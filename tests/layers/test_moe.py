"""The sparse layer equals a loop over tokens, and the dense layer."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import (
  DISPATCHES,
  EXPERTS,
  Dropless,
  Einsum,
  FeedForward,
  FeedForwardExpert,
  FfnOptions,
  Gather,
  MoE,
  MoeOptions,
  Numerics,
  Shared,
  Sorted,
)
from moe_jax.layers.routers import (
  ExpertChoice,
  Hierarchical,
  TokenChoice,
  TopologyAware,
)
from moe_jax.routing.capacity import All, Fixed, PerToken
from tests import reference
from tests.models.tiny import assert_trees_close

B, T, E, K, M, F = 3, 8, 5, 2, 6, 11


def draw(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32)


def make(
  router=TokenChoice(), activation='relu', use_bias=True, dtype='float32', **moe
):
  options = MoeOptions(
    **{'num_experts': E, 'num_selected': K, 'router': router, **moe},
    expert=FeedForwardExpert(F, activation),
  )
  return MoE(options, Shared(Numerics(dtype), use_bias))


def draw_params(layer, seed=0):
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((B, T, M)))
  leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes)['params'])
  drawn = [draw(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
  return tree.unflatten(drawn)


@functools.cache
def compiled(layer):
  return jax.jit(lambda p, x, mask: layer.apply({'params': p}, x, mask))


def run(layer, params, x, mask=None):
  """Runs a layer: (y, aux); equal layers are compiled once."""
  mask = np.ones(x.shape[:2], bool) if mask is None else mask
  return compiled(layer)(params, x, mask)


def dense(params, x):
  layer = FeedForward(FfnOptions(F, 'relu'), Shared(use_bias=True))
  return np.asarray(jax.jit(layer.apply)({'params': params}, x))


def test_layer_equals_a_loop_over_tokens():
  # Groups are half a sequence, experts have two slots, and some tokens are
  # padding.
  renormalized = TokenChoice(gates='renormalized')
  layer = make(renormalized, group_size=4, capacity=Fixed(slots=1))
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  mask = np.ones((B, T), bool)
  mask[0, 6:] = mask[2, 2] = False
  y, aux = run(layer, params, x, mask)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  tokens = np.asarray(x, np.float64).reshape(-1, 4, M)
  routing = reference.token_choice(
    tokens @ p['router']['w'],
    num_selected=K,
    capacity=1,
    mask=mask.reshape(-1, 4),
    gates='renormalized',
  )
  expected = np.zeros(tokens.shape)
  w = p['experts']
  for g, s, k in zip(*np.nonzero(routing.kept)):
    e = routing.expert_index[g, s, k]
    h = np.maximum(tokens[g, s] @ w['w_in'][e] + w['b_in'][e], 0)
    served = h @ w['w_out'][e] + w['b_out'][e]
    expected[g, s] += routing.gate[g, s, k] * served
  np.testing.assert_allclose(y, expected.reshape(B, T, M), rtol=1e-4, atol=1e-4)
  # Padding and tokens without any slot get zeros, without a bias.
  unserved = ~routing.kept.any(-1).reshape(B, T)
  assert (unserved & mask).any()
  assert not np.asarray(y)[unserved].any()
  stats = reference.routing_stats(
    routing, tokens @ p['router']['w'], mask.reshape(-1, 4)
  )
  np.testing.assert_array_equal(aux.stats.kept_load, stats['kept_load'])


def test_identical_experts_with_room_for_all_are_the_dense_layer():
  layer = make(TokenChoice(gates='renormalized'), capacity=All())
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  expert = jax.tree.map(lambda leaf: leaf[0], params['experts'])
  params['experts'] = jax.tree.map(lambda leaf: np.stack([leaf] * E), expert)
  y, _ = run(layer, params, x)
  np.testing.assert_allclose(y, dense(expert, x), rtol=1e-4, atol=1e-4)


def test_one_expert_is_the_dense_layer():
  # The raw gate is the softmax over one expert, which is exactly 1.
  layer = make(num_experts=1, num_selected=1)
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  y, _ = run(layer, params, x)
  expert = jax.tree.map(lambda leaf: leaf[0], params['experts'])
  np.testing.assert_allclose(y, dense(expert, x), rtol=1e-5, atol=1e-5)


def gradients_by_dispatch(dispatches, **options):
  """Gradients, output and aux of each dispatch, with some tokens masked."""
  x, target = draw(B, T, M, seed=9), draw(B, T, M, seed=8)
  mask = np.ones((B, T), bool)
  mask[1, 5:] = False
  params = draw_params(make(**options))

  def loss(params, x, mask, layer):
    y, aux = layer.apply({'params': params}, x, mask)
    return (y * target).sum(), (y, aux)

  gradient = jax.jit(
    jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnames='layer'
  )
  return [
    gradient(params, x, mask, layer=make(dispatch=dispatch, **options))
    for dispatch in dispatches
  ]


# Products over other settings are in `tests/routing`.
def test_dispatches_are_equal_in_outputs_and_all_gradients():
  vmoe = TokenChoice(
    gates='renormalized_after_drop', slot_priority='batch_priority'
  )
  results = gradients_by_dispatch(
    [Gather(), Einsum(), Sorted()],
    router=vmoe,
    num_selected=3,
    group_size=16,
    capacity=PerToken(0.75),
  )
  grads, (y, aux) = results[0]
  for other in results[1:]:
    assert_trees_close(results[0], other, rtol=1e-4, atol=1e-4)
  # The test is not trivial: tokens are dropped, and outputs are not zero.
  assert aux.stats.overflowed.sum() > 0
  assert np.abs(y).max() > 1
  # The loss has no auxiliary loss, so that the router learns from the gates
  # alone.
  for leaf in jax.tree.leaves(grads):
    assert np.abs(leaf).max() > 1e-2


# Sorted rows of experts without biases are in `experts.test_slots`.
def test_dropless_equals_room_for_all_in_outputs_and_all_gradients():
  options = dict(capacity=All(), activation='geglu')
  results = gradients_by_dispatch([Gather(), Dropless()], **options)
  grads, (y, aux) = results[1]
  assert_trees_close(*results, rtol=1e-4, atol=1e-4)
  assert aux.stats.overflowed.sum() == 0 and np.abs(y).max() > 1
  for leaf in jax.tree.leaves(grads):
    assert np.abs(leaf).max() > 1e-2


def test_dropless_needs_no_room_for_what_it_does_not_have():
  # A capacity for all tokens would multiply E * B * T rows with eight experts.
  layers = [
    make(dispatch=dispatch, capacity=All(), num_experts=8)
    for dispatch in (Gather(), Dropless())
  ]
  x = jnp.ones((B, 64, M))
  shapes = [
    jax.make_jaxpr(
      lambda x, layer=layer: layer.init_with_output(jax.random.key(0), x)[0][0]
    )(x)
    for layer in layers
  ]
  rows = f'{8},{B * 64},{F}]'
  assert rows in str(shapes[0]) and rows not in str(shapes[1])


@pytest.mark.parametrize(
  ('gates', 'num_selected'), [('raw', 1), ('renormalized', 2)]
)
def test_router_gradient_is_the_slope_of_the_output(gates, num_selected):
  router = TokenChoice(gates=gates)
  layer = make(router, num_selected=num_selected, capacity=All())
  params, x = draw_params(layer), draw(B, T, M, seed=10)
  params['router']['w'] *= 0.3
  direction, target = draw(M, E, seed=7), draw(B, T, M, seed=8)

  def loss(step):
    router_w = params['router']['w'] + step * direction
    p = {**params, 'router': {'w': router_w}}
    y, aux = layer.apply({'params': p}, jnp.asarray(x))
    return (y * target).sum(), aux.stats.load

  run_loss = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (before, load_before), _ = run_loss(-1e-3)
  (after, load_after), _ = run_loss(1e-3)
  _, gradient = run_loss(0.0)
  # The difference is so small that no token changes its experts.
  np.testing.assert_array_equal(load_before, load_after)
  slope = (after - before) / 2e-3
  assert abs(gradient) > 0.1
  np.testing.assert_allclose(gradient, slope, rtol=0.02)


def test_expert_dtype_is_bfloat16_and_losses_stay_float32():
  layer = make(dtype='bfloat16', capacity=All())
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  y, aux = run(layer, params, x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  full, exact = run(make(capacity=All()), params, x)
  np.testing.assert_allclose(
    np.asarray(y, np.float32), full, rtol=0.1, atol=0.3
  )
  for leaf in jax.tree.leaves(aux):
    assert leaf.dtype == jnp.float32
  np.testing.assert_allclose(aux.z_loss, exact.z_loss, rtol=0.01)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(group_size=-2), 'group_size=-2 must be at least -1'),
    (dict(num_selected=9), r'num_selected=9 not in \[1, num_experts=5\]'),
    (dict(output_masking=1.0), r'output_masking=1.0 not in \[0, 1\)'),
    (
      dict(dispatch=Dropless()),
      "'dropless' has no slots, and capacity.kind='per_token' drops.*'gather'",
    ),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


@pytest.mark.parametrize(
  ('kinds', 'name', 'message'),
  [
    (DISPATCHES, 'gathered', "unknown dispatch 'gathered'; did you mean 'gath"),
    (EXPERTS, 'feedforward', "unknown expert 'feedforward'; did you mean 'fee"),
  ],
)
def test_unknown_names_are_refused(kinds, name, message):
  with pytest.raises(ValueError, match=message):
    kinds.get(name)


def test_an_unknown_backend_is_refused():
  with pytest.raises(ValueError, match="'block'; did you mean 'blocks'"):
    Dropless('block')


def test_where_experts_choose_nothing_is_dropped():
  assert (
    make(ExpertChoice(), dispatch=Dropless()).options.capacity == PerToken()
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (MoeOptions(num_experts=0), 'num_experts=0 is the dense twin'),
    pytest.param(
      TokenChoice(),
      r'is a TokenChoice, not MoeOptions.*MoeOptions\(router=',
      marks=pytest.mark.skipif(
        os.environ.get('MOE_JAX_TEST_TYPES') == '1',
        reason='the type checker of tests refuses it before',
      ),
    ),
  ],
)
def test_what_is_no_mixture_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    MoE(options).init(jax.random.key(0), jnp.ones((B, T, M)))


@pytest.mark.parametrize(
  ('num_experts', 'num_selected', 'router'),
  [
    (16, 4, TokenChoice(expert_groups=4, chosen_expert_groups=2)),
    (9, 3, TokenChoice(expert_groups=3, chosen_expert_groups=1)),
    (32, 4, TopologyAware(devices=4)),
    (12, 3, Hierarchical(branching=6, branches_selected=3)),
    (16, 8, Hierarchical(branching=8, branches_selected=4)),
  ],
)
def test_small_layers_have_sizes_that_their_router_takes(
  num_experts, num_selected, router
):
  options = MoeOptions(num_experts, num_selected, router=router)
  small = options.shrunk()
  assert small.num_experts == 4 and small.num_selected <= 4
  assert type(small.router) is type(router)


def test_the_dense_twin_has_the_width_of_the_experts_chosen():
  options = MoeOptions(
    num_experts=0, num_selected=3, expert=FeedForwardExpert(7)
  )
  ffn, dropout = options.within(FfnOptions(64, 'swiglu'), 0.25).twin()
  assert ffn == FfnOptions(21, 'swiglu') and dropout == 0.25
  expert = FeedForwardExpert(0, 'relu', 0.0)
  options = MoeOptions(num_experts=0, num_selected=3, expert=expert)
  ffn, dropout = options.within(FfnOptions(64, 'swiglu'), 0.25).twin()
  assert ffn == FfnOptions(192, 'relu') and dropout == 0
