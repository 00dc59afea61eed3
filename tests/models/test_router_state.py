"""Routers' state is kept apart from parameters, and moves layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.routers import TokenChoice
from moe_jax.models import trees
from moe_jax.models.encoder_decoder import EncoderOptions
from tests.models import tiny

MOE = dict(router=TokenChoice(gates='sigmoid', balance_bias_rate=0.25))


@pytest.mark.parametrize(('layers', 'num_layers'), [('every 2', 4), ('1,2', 5)])
def test_each_layers_load_moves_its_own_bias(layers, num_layers):
  model = tiny.build(dict(layers=layers, **MOE), num_layers=num_layers)
  state = trees.init_router_state(model)
  # Layer i sends all tokens to expert i, whose bias falls; the others' rise.
  load = np.zeros((num_layers, 5), np.float32)
  load[range(num_layers), np.arange(num_layers)] = 10
  new_state = trees.move_router_state(model.stacks, state, jnp.asarray(load))
  assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
  rows = np.concatenate([np.asarray(x) for x in jax.tree.leaves(new_state)])
  lowered = sorted(int(np.argmin(row)) for row in rows)
  assert lowered == list(model.stacks.sparse_layers)
  assert set(np.unique(rows)) == {-0.25, 0.25}


def test_another_rate_may_be_an_argument_of_the_step():
  model = tiny.build(MOE)
  load = jnp.asarray(np.eye(2, 5, dtype=np.float32))
  move = jax.jit(functools.partial(trees.move_router_state, model.stacks))
  new_state = move(trees.init_router_state(model), load, jnp.float32(0.5))
  (bias,) = jax.tree.leaves(new_state)
  np.testing.assert_array_equal(bias, 0.5 - np.eye(2, 5))


def test_an_encoders_layers_come_first():
  encoder = EncoderOptions(0, {'moe': {'layers': '0'}})
  model = tiny.build(
    dict(layers='1', **MOE), kind='encoder_decoder', encoder=encoder
  )
  load = np.zeros((4, 5), np.float32)
  # Loads are those of the encoder's first layer and the decoder's second.
  load[0, 4], load[3, 2] = 10, 10
  load = jnp.asarray(load)
  new_state = trees.move_router_state(
    model.stacks, trees.init_router_state(model), load
  )
  (encoder,), (decoder,) = (
    jax.tree.leaves(new_state[half]) for half in ('encoder', 'decoder')
  )
  assert np.argmin(encoder) == 4 and np.argmin(decoder) == 2
