"""The examples in the room's README run one after the other."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import layers
from moe_jax.layers import routers
from moe_jax.routing import GivenChoices
from tests import test_readme


@pytest.fixture(scope='module')
def scope():
  return test_readme.run('moe_jax/layers/README.md')


def layer_with(router):
  return layers.MoE(layers.MoeOptions(num_experts=4, router=router))


@pytest.mark.slow
def test_the_tempered_router_halves_its_logits(scope):
  tempered, x = layer_with(scope['Tempered']()), scope['x']
  usual = layer_with(routers.TokenChoice())
  params = nn.unbox(jax.jit(usual.init)(jax.random.key(0), x))['params']
  half = {'params': {**params, 'router': {'w': params['router']['w'] / 2}}}
  result = tempered.apply({'params': params}, x)
  jax.tree.map(np.testing.assert_array_equal, result, usual.apply(half, x))


@pytest.mark.slow
def test_the_router_of_cosines_is_what_it_says(scope):
  layer, x = scope['layer'], scope['x']
  params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x))['params']
  # Lengths of tokens and of directions do not matter.
  longer = {**params, 'router': {'w': 3 * params['router']['w']}}
  routed = [
    layer.apply({'params': p}, x, mutable='intermediates')[1]['intermediates']
    for p, x in ((params, x), (longer, 2 * x))
  ]
  (logits,), (others,) = (r['router']['router_logits'] for r in routed)
  np.testing.assert_allclose(logits, others, atol=1e-4)
  assert np.abs(logits).max() <= 1 / layer.options.router.temperature
  # Another's choices can be imposed, and all parameters learn.
  choices = np.tile(np.array([[3, 1]], np.int32), (*x.shape[:2], 1))

  def loss(params):
    given = GivenChoices(choices)
    y, aux = layer.apply({'params': params}, x, given=given)
    return (y**2).sum() + aux.losses['spread_loss'], aux.stats.load

  gradient, load = jax.grad(loss, has_aux=True)(params)
  np.testing.assert_array_equal(load, [0, 16, 0, 16])
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
