"""Routers' state is kept apart from parameters, and moves layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import generation
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import trees
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import All
from tests.models import tiny

MOE = dict(router=TokenChoice(gates='sigmoid', balance_bias_rate=0.25))


def filled(model, value=0.0):
  state = trees.init_router_state(model)
  return jax.tree.map(lambda x: x + value, state)


@pytest.mark.parametrize(('layers', 'num_layers'), [('every 2', 4), ('1,2', 5)])
def test_each_layers_load_moves_its_own_bias(layers, num_layers):
  model = tiny.build(dict(layers=layers, **MOE), num_layers=num_layers)
  state = filled(model)
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
  new_state = move(filled(model), load, jnp.float32(0.5))
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
  new_state = trees.move_router_state(model.stacks, filled(model), load)
  (encoder,), (decoder,) = (
    jax.tree.leaves(new_state[half]) for half in ('encoder', 'decoder')
  )
  assert np.argmin(encoder) == 4 and np.argmin(decoder) == 2


@pytest.mark.slow
def test_a_model_generates_by_its_bias():
  model = tiny.build(dict(capacity=All(), **MOE))
  params = tiny.params_of(model)
  state = filled(model)
  tokens = jnp.asarray(tiny.tokens(shape=(1, 4)))
  # In each layer one expert's bias is above all others and one's is below.
  state = jax.tree.map(lambda x: x.at[:, 1].set(9.0).at[:, 3].set(-9.0), state)
  outputs, apply = {}, jax.jit(model.apply)
  for name, biases in (('zero', filled(model)), ('pushed', state)):
    variables = trees.variables(params, biases)
    logits, aux = apply(variables, tokens)
    load = np.asarray(aux.stats.load)
    if name == 'pushed':
      assert (load[:, 1] == 4).all() and (load[:, 3] == 0).all()
    output = generation.generate(
      model, variables, [np.asarray(tokens[0])], num_tokens=1
    )
    assert int(output.rows[0][-1]) == int(jnp.argmax(logits[0, -1]))
    outputs[name] = np.asarray(logits)
  assert np.abs(outputs['zero'] - outputs['pushed']).max() > 1e-3
