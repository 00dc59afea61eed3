"""The balance of single batches that `shazeer_table6` reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import shazeer_table6
from moe_jax.layers.experts import Dropless
from moe_jax.layers.routers import NoisyTopK
from moe_jax.routing.capacity import All
from tests.models import tiny

E, K = 5, 2


def test_importance_and_loads_are_of_one_batch():
  moe = dict(
    layers='all',
    num_experts=E,
    num_selected=K,
    router=NoisyTopK(gates='renormalized', z_weight=0.0),
    capacity=All(),
    dispatch=Dropless(),
    group_size=-1,
  )
  model = tiny.build(moe)
  tokens = jnp.asarray(tiny.tokens(3))
  segments = jnp.ones(tokens.shape, jnp.int32).at[0, -2:].set(0)
  batch = dict(tokens=tokens, segment_ids=segments, positions=0 * segments)
  variables = {'params': tiny.params_of(model)}
  key = jax.random.key(3)
  numbers = np.asarray(
    shazeer_table6.balance(model)(variables, batch, key, True)
  )
  apply = functools.partial(
    model.apply,
    train=True,
    rngs={'router': key, 'dropout': key},
    mutable=['intermediates'],
  )
  (_, aux), collections = jax.jit(apply)(variables, **model.inputs(batch))
  real = np.asarray(segments).reshape(-1) > 0
  for i, layer in enumerate(
    model.stacks.layer_trees(collections['intermediates'])
  ):
    (routing,) = layer['moe']['router']['routing']
    counts = np.bincount(
      np.asarray(routing.expert_index).reshape(-1, K)[real].ravel()
    )
    np.testing.assert_allclose(numbers[3, i], counts.max() / counts.mean())
  # CV^2 of Load is the load loss, which has plain loops of its own as a test.
  n = np.asarray(aux.stats.tokens)
  np.testing.assert_allclose(numbers[1] ** 2, aux.load_loss / n, rtol=1e-4)
  np.testing.assert_allclose(
    numbers[0] ** 2, aux.importance_loss / n, rtol=1e-4
  )
  assert (numbers[2] > 1 + numbers[1] / np.sqrt(E)).all()
