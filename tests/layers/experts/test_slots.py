"""Experts are E feed-forward layers with independent initial weights."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.config import option, read_options, section_of
from moe_jax.layers import (
  Dropless,
  Einsum,
  ExpertOptions,
  FanIn,
  FeedForward,
  FeedForwardExpert,
  FfnOptions,
  Gather,
  ModuleExpert,
  MoE,
  MoeOptions,
  Numerics,
  Shared,
  Sorted,
)
from moe_jax.layers.experts.experts import FeedForwardExperts, apply_experts
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.parameters import axes_of, roles_of
from moe_jax.routing import Routing
from moe_jax.routing.capacity import All
from tests.models import tiny
from tests.models.tiny import draw

E, R, M, F = 5, 3, 6, 11


class Experts(nn.Module):
  """Feed-forward experts, of which expert e gets rows[e], by a dispatch."""

  options: FfnOptions
  shared: Shared = Shared()
  dropout: float = 0.0
  dispatch: Gather | Dropless = Gather()

  @nn.compact
  def __call__(self, rows, train=False):
    E, R, M = rows.shape
    # One group has all rows, of which the first R go to expert 0, the next R to
    # expert 1, and so on.
    index = jnp.arange(E * R, dtype=jnp.int32).reshape(1, E * R, 1)
    routing = Routing(
      expert_index=index // R,
      slot=index % R,
      gate=jnp.ones(index.shape),
      kept=jnp.ones(index.shape, bool),
      num_experts=E,
      capacity=R,
    )
    layer = FfnLayer(self.options, self.shared, self.dropout, 'expert')
    experts = FeedForwardExperts(layer, self.dispatch, name='experts')
    y, _ = experts(rows.reshape(1, E * R, M), routing, train)
    return y.reshape(rows.shape)


@pytest.mark.parametrize(
  ('activation', 'use_bias'), [('swiglu', True), ('gelu', False)]
)
def test_expert_e_is_a_feed_forward_with_its_parameters(activation, use_bias):
  options, shared = FfnOptions(F, activation), Shared(use_bias=use_bias)
  rows, layer = draw(E, R, M), Experts(options, shared)
  params = tiny.layer_params(layer, rows)
  y = np.asarray(jax.jit(layer.apply)({'params': params}, rows))
  dense = jax.jit(FeedForward(options, shared).apply)
  for e in range(E):
    expert_params = jax.tree.map(lambda leaf, e=e: leaf[e], params['experts'])
    expected = dense({'params': expert_params}, rows[e])
    np.testing.assert_allclose(y[e], expected, rtol=1e-4, atol=1e-4)


def test_experts_start_apart_with_the_fan_in_of_one():
  # With 4000 draws for each expert the standard deviation is known to about 1
  # %. A fan-in that counted the experts too would be wrong by sqrt(5).
  shared = Shared(Numerics(init=FanIn(scale=2.0)))
  layer = Experts(FfnOptions(80, 'swiglu'), shared)
  boxed = jax.jit(layer.init)(tiny.key(0), np.ones((E, 1, 50), 'f'))
  params = nn.meta.unbox(boxed)['params']['experts']
  for name, fan_in in (('w_in', 50), ('w_gate', 50), ('w_out', 80)):
    w = np.asarray(params[name]).reshape(E, -1)
    np.testing.assert_allclose(w.std(1), np.sqrt(2 / fan_in), rtol=0.06)
    between = np.corrcoef(w) - np.eye(E)
    assert np.abs(between).max() < 0.1, name


def test_experts_carry_their_axis():
  layer = Experts(FfnOptions(F), Shared(use_bias=True))
  boxed = jax.eval_shape(layer.init, jax.random.key(0), draw(E, R, M))
  boxed = boxed['params']['experts']
  assert axes_of(boxed) == {
    'w_in': ('expert', 'embed', 'expert_mlp'),
    'w_out': ('expert', 'expert_mlp', 'embed'),
    'b_in': ('expert', 'expert_mlp'),
    'b_out': ('expert', 'embed'),
  }


@pytest.mark.parametrize('dispatch', [Gather(), Dropless()])
def test_dropout_falls_on_each_expert_by_itself(dispatch):
  layer = Experts(FfnOptions(F, 'relu'), dropout=0.25, dispatch=dispatch)
  rows = jnp.ones((E, R, M))
  # All experts and all rows are equal, so that differences show what was
  # dropped.
  params = {'w_in': jnp.ones((E, M, F)), 'w_out': jnp.ones((E, F, M))}
  variables = {'params': {'experts': params}}
  rngs = {'dropout': tiny.key(0)}
  run = jax.jit(lambda v: layer.apply(v, rows, train=True, rngs=rngs))
  # `num_kept` is the number of the F hidden values that were kept, [E, R].
  num_kept = np.asarray(run(variables))[..., 0] * 0.75 / M
  np.testing.assert_allclose(num_kept, num_kept.round(), atol=1e-5)
  assert len(set(num_kept.round().ravel())) > 2
  evaluated = jax.jit(layer.apply)(variables, rows)
  np.testing.assert_allclose(evaluated, F * M, rtol=1e-5)


MOE = MoeOptions(E, 2, expert=FeedForwardExpert(F, 'gelu'))


def with_expert(expert, **changes):
  return MoE(dataclasses.replace(MOE, expert=expert, **changes))


def run_moe(layer, params, x):
  return jax.jit(lambda p, x: layer.apply({'params': p}, x)[0])(params, x)


def test_a_module_given_as_expert_equals_the_built_in_one():
  x = draw(2, 8, M)
  built_in = MoE(MOE)
  params = tiny.layer_params(built_in, x)
  custom = with_expert(ModuleExpert(FeedForward(FfnOptions(F, 'gelu'))))
  nested_params = {**params, 'experts': {'expert': params['experts']}}
  y = run_moe(built_in, params, x)
  assert np.abs(y).max() > 0.1
  np.testing.assert_allclose(
    run_moe(custom, nested_params, x), y, rtol=1e-5, atol=1e-5
  )


def test_parameters_of_any_module_are_experts_and_start_apart():
  layer = with_expert(ModuleExpert(nn.Dense(M)))
  boxed = jax.jit(layer.init)(tiny.key(0), draw(2, 8, M))
  boxed = boxed['params']['experts']['expert']
  assert roles_of(boxed) == {
    'kernel': ('expert', 'kernel'), 'bias': ('expert', 'bias'),
  }  # fmt: skip
  assert axes_of(boxed) == {
    'kernel': ('expert', None, None), 'bias': ('expert', None),
  }  # fmt: skip
  assert np.unique(nn.meta.unbox(boxed)['kernel']).size == E * M * M


def test_an_expert_in_float32_serves_rows_of_bfloat16():
  exact = with_expert(ModuleExpert(nn.Dense(M)))
  layer = MoE(exact.options, Shared(Numerics(dtype='bfloat16')))
  x = draw(2, 8, M)
  params = tiny.layer_params(layer, x)
  y = run_moe(layer, params, x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  expected = run_moe(exact, params, x.astype(jnp.bfloat16).astype(jnp.float32))
  np.testing.assert_allclose(
    y.astype(jnp.float32), expected, rtol=2e-2, atol=1e-3
  )


class Noisy(nn.Module):
  """A user's expert: a product with a power of its input, noisy in training."""

  power: int

  @nn.compact
  def __call__(self, rows, train):
    y = nn.Dense(M, use_bias=False)(rows**self.power)
    return y + train


@dataclasses.dataclass(frozen=True)
class NoisyExpert(ExpertOptions):
  power: int = option(3, 'Power that rows are raised to.', minimum=1)

  def module(self, shared, name):
    return Noisy(self.power, name=name)


def test_an_expert_of_ones_own_has_options_and_knows_of_training():
  name = f'{__name__}:NoisyExpert'
  config = section_of(MoeOptions)
  config.expert.kind = name
  config.expert.custom.power = 2
  options = read_options(MoeOptions, config)
  assert options.expert == NoisyExpert(2)
  layer = MoE(dataclasses.replace(options, num_experts=1, capacity=All()))
  x = draw(2, 8, M)
  params = tiny.layer_params(layer, x)
  (kernel,) = jax.tree.leaves(params['experts'])
  run = jax.jit(
    lambda p, x, train: layer.apply({'params': p}, x, train=train)[0],
    static_argnums=2,
  )
  for train in (False, True):
    np.testing.assert_allclose(
      run(params, x, train), x**2 @ kernel[0] + train, rtol=1e-4, atol=1e-4
    )
  with pytest.raises(ValueError, match='NoisyExpert has no dense twin'):
    options.twin()


SIZES = (2, 0, 4, 1, 1)  # the last two rows belong to no expert


@pytest.mark.as_users_compile
@pytest.mark.parametrize(
  ('activation', 'use_bias', 'backend'),
  [('gelu', False, 'megablox'), ('swiglu', True, 'blocks')],
)
def test_sorted_rows_meet_the_expert_of_their_group(
  activation, use_bias, backend
):
  options, shared = FfnOptions(F, activation), Shared(use_bias=use_bias)
  layer, dense = FfnLayer(options, shared), FeedForward(options, shared)
  params = tiny.layer_params(Experts(options, shared), draw(E, R, M))['experts']
  rows, target = draw(sum(SIZES) + 2, M, seed=7), draw(10, M, seed=8)
  sizes = jnp.array(SIZES, jnp.int32)
  live = (jnp.arange(len(rows)) < sum(SIZES))[:, None]

  def loss(params, rows):
    y = layer.compute_sorted(params, rows, sizes, backend=backend)
    y = jnp.where(live, y, 0)
    return (y * target).sum(), y

  def expected(params, rows):
    stops = list(itertools.accumulate(SIZES))
    y = [
      dense.apply(
        {'params': jax.tree.map(lambda leaf, e=e: leaf[e], params)},
        rows[stop - n : stop],
      )
      for e, (n, stop) in enumerate(zip(SIZES, stops))
    ]
    y = jnp.concatenate([*y, jnp.zeros((2, M))])
    return (y * target).sum(), y

  by_sorted, by_dense = (
    jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, rows)
    for f in (loss, expected)
  )
  tiny.assert_trees_close(by_sorted, by_dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dispatch', [Gather(), Einsum(), Sorted()])
def test_told_tokens_meet_their_experts_without_a_module(dispatch):
  # Expert 0 doubles what is positive, and expert 1 triples it. The first token
  # goes to both, the second to expert 1 alone, and the third was dropped.
  params = {
    'w_in': jnp.stack([jnp.eye(2), jnp.eye(2)]),
    'w_out': jnp.stack([2 * jnp.eye(2), 3 * jnp.eye(2)]),
  }
  x = jnp.array([[[1.0, -1], [10, 20], [7, 7]]])
  kept = jnp.array([[[True, True], [True, False], [False, False]]])
  routing = Routing(
    expert_index=jnp.array([[[0, 1], [1, 0], [1, 0]]], jnp.int32),
    slot=jnp.array([[[0, 0], [1, 0], [2, 2]]], jnp.int32),
    gate=jnp.where(kept, jnp.array([[[0.5, 0.25], [1, 0], [1, 0]]]), 0.0),
    kept=kept,
    num_experts=2,
    capacity=2,
  )
  ffn = FfnLayer(FfnOptions(2, 'relu'))
  apply = jax.jit(functools.partial(apply_experts, ffn, dispatch=dispatch))
  y, moved = apply(params, x, routing)
  assert y.tolist() == [[[1.75, 0], [30, 60], [0, 0]]] and moved is None


def test_experts_start_alike_whoever_serves_them():
  options, shared = FfnOptions(F, 'swiglu'), Shared(use_bias=True)
  rows, key = draw(E, R, M), tiny.key(3)
  slots, dropless = (
    jax.jit(Experts(options, shared, dispatch=dispatch).init)(key, rows)
    for dispatch in (Gather(), Dropless())
  )
  jax.tree.map(np.testing.assert_array_equal, slots, dropless)
