"""The shared expert, its dense twin, and experts that are cut into parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
  All,
  FeedForwardExpert,
  FfnOptions,
  Fixed,
  MoE,
  MoeOptions,
  Shared,
  TokenChoice,
)
from moe_jax.analysis import cost
from moe_jax.layers.experts import SharedExpertOptions
from moe_jax.layers.ffn import FeedForward
from moe_jax.layers.parameters import roles_of
from moe_jax.models.selection import names_of
from tests.models import tiny
from tests.models.tiny import draw

B, T, M, E, K, F, H = 2, 7, 6, 5, 3, 4, 9
RENORMALIZED = TokenChoice(gates='renormalized')


def options(activation='swiglu', **moe):
  return MoeOptions(
    num_experts=E,
    num_selected=K,
    router=RENORMALIZED,
    capacity=moe.pop('capacity', All()),
    expert=FeedForwardExpert(F, activation),
    **moe,
  )


@functools.cache
def compiled(layer):
  return jax.jit(lambda p, x, mask: layer.apply({'params': p}, x, mask))


def random_params(layer):
  return tiny.layer_params(layer, jnp.ones((B, T, M)))


def feed_forward(p, x):
  """One token through a SwiGLU layer, one hidden value after another."""
  y = np.zeros(M)
  for f in range(p['w_in'].shape[1]):
    gate, value = x @ p['w_gate'][:, f], x @ p['w_in'][:, f]
    y += gate / (1 + np.exp(-gate)) * value * p['w_out'][f]
  return y


@pytest.mark.parametrize('gated', [True, False])
def test_it_adds_a_feed_forward_of_every_token(gated):
  shared = options(shared_expert=SharedExpertOptions(H, gated))
  layer = MoE(shared)
  params, x = random_params(layer), draw(B, T, M)
  y, aux = compiled(layer)(params, x, np.ones((B, T), bool))
  routed_params = {n: p for n, p in params.items() if n != 'shared_expert'}
  routed, routed_aux = compiled(MoE(options()))(
    routed_params, x, np.ones((B, T), bool)
  )
  p = params['shared_expert']
  for b, t in np.ndindex(B, T):
    token = x[b, t].astype(np.float64)
    expected = feed_forward(p['ffn'], token)
    if gated:
      expected = expected / (1 + np.exp(-(token @ p['w_gate'][:, 0])))
    np.testing.assert_allclose(
      y[b, t] - routed[b, t], expected, rtol=1e-3, atol=1e-4
    )
  jax.tree.map(np.testing.assert_array_equal, aux, routed_aux)


def test_a_dropped_token_still_meets_it_and_padding_does_not():
  # Each expert has one slot, so that most choices are dropped. Biases would
  # make zeros of padding something else.
  moe = dict(shared_expert=SharedExpertOptions(H), capacity=Fixed(1))
  layer = MoE(options('relu', **moe), Shared(use_bias=True))
  params, x = random_params(layer), draw(B, T, M)
  mask = np.arange(T)[None] < np.array([[T], [4]])
  y, aux = compiled(layer)(params, x, mask)
  ffn = FeedForward(FfnOptions(H, 'relu'), Shared(use_bias=True))
  ffn_y = ffn.apply({'params': params['shared_expert']['ffn']}, jnp.asarray(x))
  assert aux.stats.overflowed.sum() > 0
  np.testing.assert_allclose(y[0, -1], ffn_y[0, -1], rtol=1e-5)
  np.testing.assert_array_equal(y[~mask], np.zeros((T - 4, M)))


def test_the_dense_twin_is_wider_by_it():
  twin = MoeOptions(
    num_experts=0,
    num_selected=K,
    expert=FeedForwardExpert(F),
    shared_expert=SharedExpertOptions(H, gated=True),
  ).within(FfnOptions(64, 'swiglu'), 0.25)
  assert twin.twin() == (FfnOptions(K * F + H, 'swiglu'), 0.25)
  assert twin.shared_twin == (FfnOptions(H, 'swiglu'), 0.25)
  # What experts say themselves is not the model's.
  own = MoeOptions(0, K, expert=FeedForwardExpert(0, 'relu', 0.0))
  ffn, dropout = own.within(FfnOptions(64, 'swiglu'), 0.25).twin()
  assert ffn == FfnOptions(K * 64, 'relu') and dropout == 0


def test_costs_count_it_as_a_dense_part_of_every_token():
  def count(**moe):
    return cost.count(tiny.build(moe, ffn=dict(hidden=F)), 10)

  without = count()
  for gate, kernels in ((False, 2 * 12 * H), (True, 2 * 12 * H + 12)):
    counted = count(shared_expert=SharedExpertOptions(H, gate))
    added = 2 * kernels  # in each of two layers
    assert counted.total_params == without.total_params + added
    assert counted.active_params == without.active_params + added
    assert counted.expert_params == without.expert_params
    assert counted.decoder.experts == without.decoder.experts
    assert counted.decoder.products == without.decoder.products + 2 * added


def test_its_parameters_have_a_role_of_their_own():
  layer = MoE(options(shared_expert=SharedExpertOptions(H, gated=True)))
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((B, T, M)))
  roles = roles_of(shapes['params'])
  experts = {f'w_{name}' for name in ('in', 'gate', 'out')}
  assert names_of('experts', roles) == {f'experts/{n}' for n in experts}
  shared = {f'shared_expert/ffn/{n}' for n in experts} | {
    'shared_expert/w_gate'
  }
  assert names_of('shared_experts', roles) == shared
