"""Experts are E feed-forward layers: the same numbers, independent starts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import (
  ACTIVATIONS,
  Experts,
  FeedForward,
  FfnConfig,
  Init,
  MoE,
  MoeConfig,
  RouterConfig,
)
from moe_jax.layers.experts.sorted_rows_experts import (
  DroplessExperts,
  sorted_feed_forward,
)
from moe_jax.layers.routers.router import Router
from moe_jax.routing import CapacityRule, token_choice
from tests.models import tiny

E, R, M, F = 5, 3, 6, 11


def rows_of(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def draw_params(layer, rows):
  """Parameters of the layer's shapes, biases drawn too."""
  shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), rows))
  leaves, tree = jax.tree.flatten(shapes)
  drawn = [rows_of(*x.shape, seed=i) for i, x in enumerate(leaves)]
  return tree.unflatten(drawn)


def test_one_expert_is_the_feed_forward_from_its_start():
  config = FfnConfig(F, activation='swiglu', use_bias=True)
  rows, key = rows_of(1, R, M), tiny.key(3)
  one = nn.meta.unbox(Experts(config).init(key, rows))
  dense = nn.meta.unbox(FeedForward(config).init(key, rows[0]))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), one, dense)
  y = jax.jit(Experts(config).apply)(one, rows)
  dense_y = jax.jit(FeedForward(config).apply)(dense, rows[0])
  np.testing.assert_allclose(y[0], dense_y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ('activation', 'use_bias'),
  [('swiglu', False), *((name, True) for name in ACTIVATIONS)],
)
def test_expert_e_is_a_feed_forward_with_its_parameters(activation, use_bias):
  config = FfnConfig(F, activation=activation, use_bias=use_bias)
  rows = rows_of(E, R, M)
  params = draw_params(Experts(config), rows)
  y = np.asarray(jax.jit(Experts(config).apply)(params, rows))
  dense = jax.jit(FeedForward(config).apply)
  for e in range(E):
    own = jax.tree.map(lambda leaf, e=e: leaf[e], params)
    np.testing.assert_allclose(y[e], dense(own, rows[e]), rtol=1e-4, atol=1e-4)


def test_experts_start_apart_with_the_fan_in_of_one():
  # 4000 draws an expert: the deviation's own is about 1 %. A fan-in that
  # counted the experts too would be off by sqrt(5).
  layer = Experts(FfnConfig(80, activation='swiglu', init=Init(scale=2.0)))
  params = layer.init(tiny.key(0), jnp.ones((E, 1, 50)))
  params = nn.meta.unbox(params)['params']
  for name, fan_in in (('w_in', 50), ('w_gate', 50), ('w_out', 80)):
    w = np.asarray(params[name]).reshape(E, -1)
    np.testing.assert_allclose(w.std(1), np.sqrt(2 / fan_in), rtol=0.06)
    between = np.corrcoef(w) - np.eye(E)
    assert np.abs(between).max() < 0.1, name


def test_experts_carry_their_axis():
  layer = Experts(FfnConfig(F, use_bias=True))
  boxed = jax.eval_shape(layer.init, jax.random.key(0), rows_of(E, R, M))
  names = {name: box.names for name, box in boxed['params'].items()}
  assert names == {
    'w_in': ('expert', 'embed', 'expert_mlp'),
    'w_out': ('expert', 'expert_mlp', 'embed'),
    'b_in': ('expert', 'expert_mlp'),
    'b_out': ('expert', 'embed'),
  }


def test_dropout_falls_on_each_expert_by_itself():
  layer = Experts(FfnConfig(F, dropout=0.5))
  rows = jnp.ones((E, R, M))
  # Every expert and every row alike: what differs is what was dropped.
  params = {'w_in': jnp.ones((E, M, F)), 'w_out': jnp.ones((E, F, M))}
  rngs = {'dropout': tiny.key(0)}
  run = jax.jit(
    lambda p: layer.apply({'params': p}, rows, train=True, rngs=rngs)
  )
  kept = np.asarray(run(params))[..., 0] / (2 * M)  # of F hidden values, [E, R]
  np.testing.assert_allclose(kept, kept.round(), atol=1e-5)
  assert len(set(kept.round().ravel())) > 2
  evaluated = jax.jit(layer.apply)({'params': params}, rows)
  np.testing.assert_allclose(evaluated, F * M, rtol=1e-5)


class Cube(nn.Module):
  """An expert that no config describes."""

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(1.0)
    scale = self.param('scale', init, (x.shape[-1],), jnp.float32)
    return scale[None] * x**3


MOE = MoeConfig(
  router=RouterConfig(num_experts=E, num_selected=2),
  expert=FfnConfig(F, activation='gelu'),
)


def run_moe(layer, params, x):
  return jax.jit(lambda p: layer.apply({'params': p}, x)[0])(params)


def test_a_module_given_as_expert_equals_the_built_in_one():
  x = rows_of(2, 8, M)
  own = MoE(MOE)
  params = draw_params(own, x)['params']
  given = MoE(MOE, expert=FeedForward(MOE.expert))
  shapes = nn.meta.unbox(jax.eval_shape(given.init, jax.random.key(0), x))
  (name,) = shapes['params'].keys() - {'router'}
  moved = {'router': params['router'], name: params['experts']}
  y = run_moe(own, params, x)
  assert np.abs(y).max() > 0.1
  np.testing.assert_allclose(run_moe(given, moved, x), y, rtol=1e-5, atol=1e-5)


def test_any_module_can_be_an_expert():
  # Expert e cubes its input and scales it by its own weights.
  x = rows_of(2, 8, M)
  layer = MoE(MOE, expert=Cube())
  start = nn.meta.unbox(jax.jit(layer.init)(tiny.key(0), x))['params']
  (name,) = start.keys() - {'router'}
  scale = start[name]['scale']
  assert scale.shape == (E, M)
  assert np.unique(scale).size == E * M
  # All tokens prefer expert 3, then 1; gates are theirs, room is for two.
  w = np.zeros((M, E), np.float32)
  x = x.at[..., 0].set(1.0)
  w[0] = [0, 1, 0, 2, 0]
  gate = np.exp(w[0]) / np.exp(w[0]).sum()
  expected = (gate[3] * scale[3] + gate[1] * scale[1])[None, None] * x**3
  y = np.asarray(run_moe(layer, {**start, 'router': {'w': w}}, x))
  np.testing.assert_allclose(y[:, :2], expected[:, :2], rtol=1e-4, atol=1e-5)
  assert not y[:, 2:].any()


INNER = MoeConfig(
  router=RouterConfig(
    num_experts=3,
    num_selected=2,
    gates='renormalized',
    capacity=CapacityRule('all'),
  ),
  expert=FfnConfig(F),
  group_size=-1,  # all rows of an expert: the loss is of one group
)


@pytest.mark.parametrize('dispatch', ['gather', 'einsum'])
def test_a_mixture_can_be_an_expert(dispatch):
  # Each expert is a mixture of three; a token goes to two of two each.
  c = dataclasses.replace(MOE, dispatch=dispatch)
  layer = MoE(c, expert=MoE(dataclasses.replace(INNER, dispatch=dispatch)))
  x = rows_of(2, 8, M)
  params = draw_params(layer, x)['params']
  (name,) = params.keys() - {'router'}
  y, aux = jax.jit(lambda p: layer.apply({'params': p}, x))(params)
  # One after the other: each inner mixture on the tokens that it has.
  route = jax.jit(Router(MOE.router).apply)
  routed, own = route({'params': params['router']}, x, jnp.ones((2, 8), bool))
  serve = jax.jit(lambda p, mask: MoE(INNER).apply({'params': p}, x, mask))
  expected, losses = np.zeros(x.shape), 0.0
  for e in range(E):
    has = np.asarray((routed.expert_index == e) & routed.kept)
    gate = np.where(has, routed.gate, 0).sum(-1, keepdims=True)
    inner = jax.tree.map(lambda leaf, e=e: leaf[e], params[name])
    served, found = serve(inner, has.any(-1))
    expected += gate * served
    losses += found.balance_loss
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  assert losses > 1
  np.testing.assert_allclose(
    aux.balance_loss, own.balance_loss + losses, rtol=1e-5
  )
  np.testing.assert_array_equal(aux.stats.load, own.stats.load)
  inner = params[name]['experts']['w_in']
  assert inner.shape == (E, 3, M, F)


SIZES = (2, 0, 4, 1, 1)  # and two rows that are no one's


@pytest.mark.parametrize('backend', ['auto', 'blocks', 'ragged_dot'])
@pytest.mark.parametrize(
  ('activation', 'use_bias'),
  [('gelu', False), ('swiglu', False), ('swiglu', True)],
)
def test_sorted_rows_meet_the_expert_of_their_group(
  activation, use_bias, backend
):
  config = FfnConfig(F, activation=activation, use_bias=use_bias)
  params = draw_params(Experts(config), rows_of(E, R, M))
  rows, target = rows_of(sum(SIZES) + 2, M, seed=7), rows_of(10, M, seed=8)
  sizes = jnp.array(SIZES, jnp.int32)
  live = (jnp.arange(len(rows)) < sum(SIZES))[:, None]

  def loss(params, rows):
    y = sorted_feed_forward(config, params['params'], rows, sizes, backend)
    y = jnp.where(live, y, 0)
    return (y * target).sum(), y

  def expected(params, rows):
    dense, stops = FeedForward(config), list(itertools.accumulate(SIZES))
    y = [
      dense.apply(
        jax.tree.map(lambda leaf, e=e: leaf[e], params), rows[stop - n : stop]
      )
      for e, (n, stop) in enumerate(zip(SIZES, stops))
    ]
    y = jnp.concatenate([*y, jnp.zeros((2, M))])
    return (y * target).sum(), y

  got, wanted = (
    jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, rows)
    for f in (loss, expected)
  )
  tiny.assert_trees_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_of_sorted_rows():
  config = FfnConfig(F, dropout=0.5)
  rows, sizes = rows_of(10, M), jnp.array(SIZES, jnp.int32)
  params = draw_params(Experts(config), rows_of(E, R, M))['params']

  @jax.jit
  def run(key=None):
    return sorted_feed_forward(config, params, rows, sizes, 'auto', key)

  kept = run()
  drawn = np.mean([run(tiny.key(i)) for i in range(400)], axis=0)
  assert np.abs(np.asarray(run(tiny.key(0))) - kept).max() > 0.1
  np.testing.assert_allclose(drawn, kept, atol=0.35 * np.abs(kept).max())


def test_dropless_experts_start_as_experts_do():
  config = FfnConfig(F, activation='swiglu', use_bias=True)
  logits = rows_of(2, 4, E)
  routing = token_choice(logits, num_selected=2, capacity=None)
  x, key = rows_of(2, 4, M), tiny.key(3)
  found = DroplessExperts(config).init(key, x, routing)
  jax.tree.map(
    np.testing.assert_array_equal,
    found,
    Experts(config).init(key, rows_of(E, R, M)),
  )


def test_an_expert_of_ones_own_is_refused_under_dropless():
  config = MoeConfig(
    router=RouterConfig(num_experts=E, capacity=CapacityRule('all')),
    expert=FfnConfig(F),
    dispatch='dropless',
  )
  layer = MoE(config, expert=nn.Dense(M))
  with pytest.raises(ValueError, match="'dropless' with an expert of your own"):
    jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 4, M)))
  layer = MoE(config, expert=MoE(INNER))
  with pytest.raises(ValueError, match="'dropless' with an expert of your own"):
    jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 4, M)))
