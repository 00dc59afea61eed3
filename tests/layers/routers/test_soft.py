"""Soft MoE: mixtures in slots, against a loop; for encoders alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
  All,
  Einsum,
  FeedForwardExpert,
  MoE,
  MoeOptions,
  models,
  partitioning,
)
from moe_jax.layers.routers import Soft
from moe_jax.layers.shared import RULES, Shared
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.soft_rule import soft_routing
from tests import reference
from tests.models import tiny
from tests.models.tiny import draw

B, T, M, E, P, F = 8, 7, 6, 4, 3, 5
OPTIONS = MoeOptions(
  num_experts=E,
  router=Soft(slots_per_expert=P),
  capacity=All(),
  expert=FeedForwardExpert(F, 'relu'),
  dispatch=Einsum(),
)


PARAMS = {
  'router': {'w': draw(M, E, P, seed=1), 'scale': np.array([2.5], np.float32)},
  'experts': {'w_in': draw(E, M, F, seed=2), 'w_out': draw(E, F, M, seed=3)},
}
MASK = np.arange(T)[None] < np.array([T, 4, 1, 0, T, T, 2, T])[:, None]


@jax.jit
def run(params, x, mask):
  return MoE(OPTIONS).apply({'params': params}, x, mask)


def test_a_slot_is_a_mean_of_tokens_and_a_token_one_of_slots():
  # Two tokens and two experts of one slot. The first slot weighs tokens 3 to 1,
  # the second equally; the third token is padding. The first token weighs the
  # slots 3 to 1, the second equally.
  logits = jnp.log(jnp.array([[[[3.0], [1.0]], [[1.0], [1.0]], [[9.0], [9]]]]))
  chosen = soft_routing(logits, jnp.array([[True, True, False]]))
  share = [[0.75, 0.5], [0.25, 0.5], [0, 0]]
  np.testing.assert_allclose(chosen.share[0, ..., 0], share, rtol=1e-6)
  gate = [[0.75, 0.25], [0.5, 0.5], [0, 0]]
  np.testing.assert_allclose(chosen.gate[0, ..., 0], gate, rtol=1e-6)
  np.testing.assert_allclose(chosen.token_gates()[0], gate, rtol=1e-6)
  assert chosen.rows_per_expert().tolist() == [1, 1]
  swapped = chosen.of_experts(jnp.array([1, 2]), 2)
  np.testing.assert_allclose(
    swapped.share[0, ..., 0], [[0, 0.75], [0, 0.25], [0, 0]], rtol=1e-6
  )


def test_a_layer_equals_a_loop_over_slots():
  x = draw(B, T, M)
  y, aux = run(PARAMS, jnp.asarray(x), jnp.asarray(MASK))
  w_in, w_out = map(np.float64, PARAMS['experts'].values())
  experts = [
    lambda v, e=e: np.maximum(v @ w_in[e], 0) @ w_out[e] for e in range(E)
  ]
  for b in range(B):
    real = x[b, MASK[b]].astype(np.float64)
    if len(real):
      expected = reference.soft_moe(real, PARAMS['router']['w'], 2.5, experts)
      np.testing.assert_allclose(y[b, MASK[b]], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(y[b, ~MASK[b]], 0)
  np.testing.assert_allclose(aux.stats.load.sum(), MASK.sum(), rtol=1e-5)
  assert aux.stats.overflowed.sum() == 0


def test_a_layer_on_a_mesh_equals_one_device():
  mesh = partitioning.make_mesh(dict(data=2, expert=4))
  layer = MoE(OPTIONS, Shared(rules=RULES))

  @jax.jit
  def value_and_gradient(params, x, mask):
    def loss(params):
      y, _ = layer.apply({'params': params}, x, mask)
      return (y**2).sum(), y

    return jax.value_and_grad(loss, has_aux=True)(params)

  params = jax.tree.map(jnp.asarray, PARAMS)
  unsharded = value_and_gradient(params, jnp.asarray(draw(B, T, M)), MASK)
  shardings = [
    partitioning.sharding(mesh, RULES, ('batch', *[None] * n), (B, *[T] * n))
    for n in (2, 1)
  ]
  x, mask = map(jax.device_put, (draw(B, T, M), MASK), shardings)
  sharded = value_and_gradient(params, x, mask)
  tiny.assert_trees_close(unsharded, sharded, rtol=1e-3, atol=1e-4)


def test_other_rows_change_nothing_and_are_never_in_one_group():
  x = draw(B, T, M)
  other = np.concatenate([x[:1], draw(B - 1, T, M, seed=7)])
  mask = jnp.ones((B, T), bool)
  y, other_y = (run(PARAMS, jnp.asarray(rows), mask)[0] for rows in (x, other))
  np.testing.assert_array_equal(y[0], other_y[0])
  assert np.abs(y[1:] - other_y[1:]).max() > 0.1
  for size, tokens in ((2 * T, 2 * T), (-1, B * T)):
    layer = MoE(dataclasses.replace(OPTIONS, group_size=size))
    with pytest.raises(ValueError, match=f'the {tokens} tokens of a group are'):
      layer.apply({'params': PARAMS}, jnp.asarray(x))


SOFT = {
  'router': {'kind': 'soft', 'soft': {'slots_per_expert': 2}},
  'dispatch': {'kind': 'einsum'},
  'capacity': {'kind': 'all'},
  'layers': '1',
}


@pytest.mark.parametrize(
  ('size', 'run', 'problem'),
  [
    (0, {}, None),
    (4, {}, None),
    (-1, dict(rows=1), None),
    (16, {}, 'model.moe.group_size=16 has several rows of data.seq_len=8'),
    (-1, {}, 'model.moe.group_size=-1 has several rows of data.seq_len=8'),
    (0, dict(packed=True), 'data.pack=True: short examples share a row'),
  ],
)
def test_a_run_never_mixes_examples(size, run, problem):
  options = tiny.options(
    dict(layers='none'),
    kind='encoder_decoder',
    encoder=EncoderOptions(2, {'moe': SOFT | {'group_size': size}}),
  )
  sizes = dict(total_steps=1, rows=4, microbatches=1, seq_len=8, target_len=6)
  shape = models.RunShape(**sizes | run)
  problems = [p for p in options.problems_in(shape) if 'mix' in p]
  assert len(problems) == (problem is not None)
  assert all(p.startswith(problem) for p in problems)
