"""What checkpoints do their own way: bias, padding, groups, masked outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import FfnConfig, MoE, MoeConfig, RouterConfig
from moe_jax.routing import CapacityRule, token_choice, transformers_nllb

B, T, E, M, F = 3, 4, 5, 6, 11


def draw(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def make(rule=None, num_selected=1, router=None, **options):
  router = RouterConfig(
    num_experts=E,
    num_selected=num_selected,
    capacity=rule or CapacityRule('all'),
    **(router or {}),
  )
  return MoE(MoeConfig(router=router, expert=FfnConfig(F), **options))


@functools.cache
def params_of(layer):
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((B, T, M)))
  leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes)['params'])
  return tree.unflatten(
    [draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
  )


def run(layer, x, mask=None, params=None, **kwargs):
  call = jax.jit(lambda p, x: layer.apply({'params': p}, x, mask, **kwargs))
  return call(params or params_of(layer), x)


def test_a_bias_moves_tokens_to_its_expert():
  plain, biased = make(), make(router=dict(use_bias=True))
  params = params_of(plain)
  b = jnp.zeros(E).at[3].set(100.0)
  with_bias = {**params, 'router': {'w': params['router']['w'], 'b': b}}
  _, aux = run(biased, draw(B, T, M), params=with_bias)
  np.testing.assert_array_equal(aux.stats.load, [0, 0, 0, B * T, 0])
  none = {**params, 'router': {'w': params['router']['w'], 'b': 0 * b}}
  y, _ = run(biased, draw(B, T, M), params=none)
  np.testing.assert_array_equal(y, run(plain, draw(B, T, M))[0])


@pytest.mark.parametrize('takes', [False, True])
def test_padding_takes_slots_only_if_asked(takes):
  # All tokens are alike and go to one expert with two slots; the first token
  # of each row is padding.
  layer = make(CapacityRule('fixed', slots=2), route_padding=takes)
  x = jnp.broadcast_to(draw(M)[None, None], (B, T, M))
  mask = jnp.arange(T)[None] > jnp.zeros((B, 1))
  y, aux = run(layer, x, mask)
  served = np.abs(np.asarray(y)).max(-1) > 0
  np.testing.assert_array_equal(served[0], [takes, True, not takes, False])
  assert aux.stats.tokens == B * (T if takes else T - 1)


def test_the_whole_batch_can_be_one_group():
  # Twelve tokens of one expert with five slots: the first five, of any row.
  layer = make(CapacityRule('fixed', slots=5), group_size=-1)
  x = jnp.broadcast_to(draw(M)[None, None], (B, T, M))
  served = np.abs(np.asarray(run(layer, x)[0])).max(-1) > 0
  np.testing.assert_array_equal(served.reshape(-1), np.arange(B * T) < 5)


def test_outputs_are_masked_in_training_and_scaled_in_evaluation():
  rate = 0.25
  plain, masked = make(), make(output_masking=rate)
  x = draw(B, 50, M)
  whole = np.asarray(run(plain, x)[0])
  scaled = np.asarray(run(masked, x)[0])
  np.testing.assert_allclose(scaled, 0.75 * whole, rtol=1e-5, atol=1e-6)
  rngs = {'router': jax.random.key(1)}
  trained = np.asarray(run(masked, x, train=True, rngs=rngs)[0])
  gone = np.abs(trained).max(-1) == 0
  np.testing.assert_allclose(trained[~gone], whole[~gone], rtol=1e-5, atol=1e-6)
  # 150 draws: four standard deviations are 0.14.
  assert abs(gone.mean() - rate) < 0.14


def test_transformers_nllb_serves_by_rank():
  # Token 0 chooses experts 4, 2; token 1 chooses 2, 4; one slot each, and
  # token 1's first choice comes before token 0's second.
  logits = jnp.array([[[0, 0, 2.0, 0, 3], [0, 0, 4, 0, 2]]])
  chosen = token_choice(
    logits,
    num_selected=2,
    capacity=1,
    gates='renormalized',
    slot_priority='choice_major',
  )
  np.testing.assert_array_equal(chosen.kept, [[[1, 0], [1, 0]]])
  ranked = transformers_nllb.by_rank(chosen)
  np.testing.assert_array_equal(ranked.expert_index, [[[1, 0], [1, 0]]])
  np.testing.assert_array_equal(ranked.slot, [[[0, 0], [1, 1]]])
  np.testing.assert_array_equal(ranked.gate, chosen.gate)
  np.testing.assert_array_equal(ranked.kept, chosen.kept)
  assert ranked.capacity == 2
  # And so in a layer: first choices through expert 1.
  router = dict(gates='renormalized', served_by='transformers_nllb')
  layer = make(num_selected=2, router=router)
  params, x = params_of(layer), draw(B, T, M)
  probs = jax.nn.softmax(x @ params['router']['w'])
  first, second = -np.sort(-np.asarray(probs), -1)[..., :2].transpose(2, 0, 1)
  w = params['experts']
  out = [jax.nn.relu(x @ w['w_in'][e]) @ w['w_out'][e] for e in (0, 1)]
  total = first + second
  expected = (first / total)[..., None] * out[1]
  expected = expected + (second / total)[..., None] * out[0]
  y, aux = run(layer, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  assert aux.stats.load[2:].sum() > 0  # what was chosen is what is counted


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(router=dict(served_by='nllb')), "unknown served_by 'nllb'"),
    (dict(router=dict(served_by='transformers_nllb')), 'num_selected=2 of at'),
    (dict(output_masking=1.0), r'output_masking=1.0 not in \[0, 1\)'),
  ],
)
def test_bad_conventions_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)
