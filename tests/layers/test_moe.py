"""The sparse layer equals loops over tokens or experts, and the dense layer.

The oracles are plain loops in numpy, the dense feed-forward, and dispatches for
each other; groups, capacities and conventions are told by small numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import (
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
from moe_jax.layers.experts.few_tokens import Batched, Unrolled, unrolled
from moe_jax.layers.moe import to_groups
from moe_jax.layers.routers import (
  ExpertChoice,
  Hierarchical,
  TokenChoice,
  TopologyAware,
)
from moe_jax.routing.capacity import All, Fixed, PerAssignment, PerToken
from tests import reference
from tests.models import tiny
from tests.models.tiny import assert_trees_close, draw

B, T, E, K, M, F = 3, 8, 5, 2, 6, 11


def make(
  router=TokenChoice(), activation='relu', use_bias=True, dtype='float32', **moe
):
  options = MoeOptions(
    **{'num_experts': E, 'num_selected': K, 'router': router, **moe},
    expert=FeedForwardExpert(F, activation),
  )
  return MoE(options, Shared(Numerics(dtype), use_bias))


def draw_params(layer):
  return tiny.layer_params(layer, jnp.ones((B, T, M)))


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


def served(params, e, token):
  """Computes the output of one expert for a token, in float64."""
  w = {k: np.float64(leaf[e]) for k, leaf in params['experts'].items()}
  return np.maximum(token @ w['w_in'] + w['b_in'], 0) @ w['w_out'] + w['b_out']


def test_layer_equals_a_loop_over_tokens():
  # Groups are half a sequence, experts have two slots, and some tokens are
  # padding.
  renormalized = TokenChoice(gates='renormalized')
  layer = make(renormalized, group_size=4, capacity=Fixed(slots=1))
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  mask = np.ones((B, T), bool)
  mask[0, 6:] = mask[2, 2] = False
  y, aux = run(layer, params, x, mask)
  tokens, groups = np.float64(x).reshape(-1, 4, M), mask.reshape(-1, 4)
  logits = tokens @ params['router']['w']
  routing = reference.token_choice(
    logits, num_selected=K, capacity=1, mask=groups, gates='renormalized'
  )
  expected = np.zeros(tokens.shape)
  for g, s, k in zip(*np.nonzero(routing.kept)):
    y_expert = served(params, routing.expert_index[g, s, k], tokens[g, s])
    expected[g, s] += routing.gate[g, s, k] * y_expert
  np.testing.assert_allclose(y, expected.reshape(B, T, M), rtol=1e-4, atol=1e-4)
  # Padding and tokens without any slot get zeros, without a bias.
  unserved = ~routing.kept.any(-1).reshape(B, T)
  assert (unserved & mask).any()
  assert not np.asarray(y)[unserved].any()
  stats = reference.routing_stats(routing, logits, groups)
  np.testing.assert_array_equal(aux.stats.kept_load, stats['kept_load'])


@pytest.mark.parametrize(
  ('E', 'K', 'gates', 'capacity'),
  # The raw gate is the softmax over one expert, which is exactly 1.
  [(E, K, 'renormalized', All()), (1, 1, 'raw', PerToken())],
)
def test_one_expert_or_equal_ones_are_the_dense_layer(E, K, gates, capacity):
  sizes = dict(num_experts=E, num_selected=K, capacity=capacity)
  layer = make(TokenChoice(gates=gates), **sizes)
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  expert = jax.tree.map(lambda leaf: leaf[0], params['experts'])
  params['experts'] = jax.tree.map(lambda leaf: np.stack([leaf] * E), expert)
  y, _ = run(layer, params, x)
  np.testing.assert_allclose(y, dense(expert, x), rtol=1e-4, atol=1e-4)


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


VMOE = TokenChoice(
  gates='renormalized_after_drop', slot_priority='batch_priority'
)


# Products over other settings are in `tests/routing`, and sorted rows of
# experts without biases in `experts.test_slots`. The loss has no auxiliary
# loss, so that the router learns from the gates alone.
@pytest.mark.parametrize(
  ('dispatches', 'options'),
  [
    (
      (Einsum(), Sorted()),
      dict(router=VMOE, num_selected=3, group_size=16, capacity=PerToken(0.75)),
    ),
    ((Dropless(),), dict(capacity=All(), activation='geglu')),
    ((Dropless(),), dict(router=ExpertChoice(), capacity=PerAssignment(0.5))),
  ],
)
def test_dispatches_are_equal_in_outputs_and_all_gradients(dispatches, options):
  first, *others = gradients_by_dispatch([Gather(), *dispatches], **options)
  for other in others:
    assert_trees_close(first, other, rtol=1e-4, atol=1e-4)
  grads, (y, aux) = first
  assert (aux.stats.overflowed.sum() > 0) == options['capacity'].binds
  assert np.abs(y).max() > 1
  for leaf in jax.tree.leaves(grads):
    assert np.abs(leaf).max() > 1e-2


def test_dropless_needs_no_room_for_what_it_does_not_have():
  # A capacity for all tokens would multiply E * B * T rows with eight experts.
  for dispatch, has_room in ((Gather(), True), (Dropless(), False)):
    layer = make(dispatch=dispatch, capacity=All(), num_experts=8)
    init = functools.partial(layer.init_with_output, jax.random.key(0))
    program = jax.make_jaxpr(lambda x, f=init: f(x)[0][0])(jnp.ones((B, 64, M)))
    assert (f'{8},{B * 64},{F}]' in str(program)) == has_room


def test_router_gradient_is_the_slope_of_the_output():
  layer = make(TokenChoice(gates='renormalized'), capacity=All())
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


def test_to_groups_cuts_consecutive_tokens_and_pads_the_last():
  x = jnp.asarray(np.arange(24, dtype=np.float32).reshape(B, T, 1))
  mask = np.ones((B, T), bool)
  mask[0, 1] = False
  mask = jnp.asarray(mask)
  groups, group_mask = to_groups(x, mask, 16)
  np.testing.assert_array_equal(
    groups[..., 0], [list(range(16)), [*range(16, 24), *[0] * 8]]
  )
  expected = np.ones((2, 16), bool)
  expected[0, 1] = expected[1, 8:] = False
  np.testing.assert_array_equal(group_mask, expected)
  assert to_groups(x, mask, 0)[0].shape == (B, T, 1)
  assert to_groups(x, mask, 4)[0].shape == (6, 4, 1)


# All tokens are alike, so that each group fills its expert: G * C choices are
# kept.
@pytest.mark.parametrize(
  ('rule', 'group_size', 'kept'),
  [
    # With S = 16 capacity is ceil(1.25 * S / 5) = 4, in each of 2 groups, of
    # which the second is half padding.
    (PerToken(1.25), 16, 2 * 4),
    # With S = 8 it is ceil(1.25 * 2 * 8 / 5) = 4, in each of 3 groups.
    (PerAssignment(1.25), 0, 3 * 4),
  ],
)
def test_capacity_is_the_rule_at_the_size_of_the_group(rule, group_size, kept):
  layer, row = make(group_size=group_size, capacity=rule), draw(1, 1, M)
  params = draw_params(layer)
  _, aux = run(layer, params, np.tile(row, (B, T, 1)))
  load = np.zeros(E)
  logits = np.asarray(row[0, 0] @ params['router']['w'])
  load[np.argsort(-logits)[:K]] = kept
  np.testing.assert_array_equal(aux.stats.kept_load, load)
  np.testing.assert_array_equal(aux.stats.tokens, B * T)


TIGHT = Fixed(slots=3)


def test_an_incomplete_group_is_as_good_as_alone():
  # The 24 tokens are in groups of 16: rows 0 and 1 are a group, and row 2 is
  # half of one.
  router = TokenChoice(sequence_balance_weight=0.1)
  layer = make(router, group_size=16, capacity=TIGHT)
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  y, aux = run(layer, params, x)
  pair, pair_aux = run(layer, params, x[:2])
  small_groups = make(router, group_size=8, capacity=TIGHT)
  last, last_aux = run(small_groups, params, x[2:])
  np.testing.assert_allclose(y[:2], pair, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(y[2:], last, rtol=1e-5, atol=1e-5)
  total = jax.tree.map(lambda a, b: a + b, pair_aux, last_aux)
  assert_trees_close(aux, total)
  assert aux.stats.overflowed.sum() > 0
  # A loss of rows is that of each row, though two of them are a group.
  logits = x.astype(np.float64) @ params['router']['w']
  index = np.argsort(-logits, -1)[..., :K]
  losses = reference.balance_loss(
    reference.softmax(logits), index, np.ones((B, T), bool)
  )
  np.testing.assert_allclose(
    aux.sequence_balance_loss, T * losses.sum(), rtol=1e-5
  )


def test_the_whole_batch_can_be_one_group():
  # All tokens choose the same two experts with five slots each: they serve the
  # first five tokens of the batch.
  layer = make(group_size=-1, capacity=Fixed(slots=5))
  x = np.tile(draw(1, 1, M), (B, T, 1))
  y, _ = run(layer, draw_params(layer), x)
  served = np.abs(np.asarray(y)).max(-1) > 0
  np.testing.assert_array_equal(served.ravel(), np.arange(B * T) < 5)


def test_a_bias_moves_tokens_to_its_expert():
  router = dict(num_selected=1, capacity=All(), use_bias=False)
  plain, biased = make(**router), make(TokenChoice(use_bias=True), **router)
  params, x = draw_params(plain), draw(B, T, M, seed=9)
  b = np.zeros(E, np.float32)
  b[3] = 100.0
  w = params['router']['w']
  _, aux = run(biased, {**params, 'router': {'w': w, 'b': b}}, x)
  np.testing.assert_array_equal(aux.stats.load, [0, 0, 0, B * T, 0])
  y, _ = run(biased, {**params, 'router': {'w': w, 'b': 0 * b}}, x)
  np.testing.assert_array_equal(y, run(plain, params, x)[0])


@pytest.mark.parametrize('router', [TokenChoice(), ExpertChoice()])
def test_outputs_are_masked_in_training_and_scaled_in_evaluation(router):
  settings = dict(num_selected=1, capacity=PerToken(1.0), use_bias=False)
  plain = make(router, **settings)
  masked = make(router, output_masking=0.25, **settings)
  params, x = draw_params(plain), draw(B, 50, M, seed=9)
  clean, scaled = (np.asarray(run(o, params, x)[0]) for o in (plain, masked))
  np.testing.assert_allclose(scaled, 0.75 * clean, rtol=1e-5, atol=1e-6)
  train = jax.jit(functools.partial(masked.apply, train=True))
  y, _ = train({'params': params}, x, rngs={'router': tiny.key(1)})
  served = np.abs(clean).max(-1) > 0
  if not router.by_expert:
    zero = np.abs(y).max(-1) == 0
    np.testing.assert_allclose(y[~zero], clean[~zero], rtol=1e-5, atol=1e-6)
  # With 100 draws four standard deviations are 0.17; some tokens have several.
  changed = (np.abs(y - clean).max(-1) > 1e-5)[served].mean()
  assert 0.25 - 0.17 < changed < 0.25 + 0.25


def test_layer_equals_a_loop_over_experts():
  # Groups are half a sequence, in which an expert takes one token.
  layer = make(ExpertChoice(), group_size=4, capacity=PerAssignment(0.5))
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  mask = np.ones((B, T), bool)
  mask[1, 5:] = False
  y, aux = jax.jit(layer.apply)({'params': params}, x, mask)
  tokens = np.float64(x).reshape(-1, 4, M)
  index, gate = reference.expert_choice(
    tokens @ params['router']['w'], 1, mask.reshape(-1, 4)
  )
  expected = np.zeros(tokens.shape)
  for g, e, c in zip(*np.nonzero(index < 4)):
    s = index[g, e, c]
    expected[g, s] += gate[g, e, c] * served(params, e, tokens[g, s])
  np.testing.assert_allclose(y, expected.reshape(B, T, M), rtol=1e-4, atol=1e-4)
  lost = ~expected.reshape(B, T, M).any(-1)
  assert (lost & mask).any() and not np.asarray(y)[lost].any()
  np.testing.assert_array_equal(aux.stats.overflowed, [(lost & mask).sum()] * K)


@pytest.mark.parametrize(
  ('dispatch', 'capacity'),
  [
    (Batched(), PerAssignment(0.5)),
    (Unrolled(), All()),
  ],
)
def test_steps_of_few_tokens_are_the_same_where_experts_choose(
  dispatch, capacity
):
  plain = make(ExpertChoice(), capacity=capacity)
  params, x = draw_params(plain), draw(2, T, M, seed=9)
  mask = np.arange(T)[None] < np.array([[T], [5]])
  expected, _ = run(plain, params, x, mask)
  if dispatch == Unrolled():
    params = unrolled(params)
  y, _ = run(
    make(ExpertChoice(), capacity=capacity, dispatch=dispatch), params, x, mask
  )
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(expected).max() > 1


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
  ('num_experts', 'num_selected', 'router'),
  [
    (16, 4, TokenChoice(expert_groups=4, chosen_expert_groups=2)),
    (32, 4, TopologyAware(devices=4)),
    (12, 3, Hierarchical(branching=6, branches_selected=3)),
  ],
)
def test_small_layers_have_sizes_that_their_router_takes(
  num_experts, num_selected, router
):
  small = MoeOptions(num_experts, num_selected, router=router).shrunk()
  assert small.num_experts == 4 and small.num_selected <= 4
  assert type(small.router) is type(router)
