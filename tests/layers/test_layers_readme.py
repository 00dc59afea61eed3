"""The examples in the room's README run one after the other."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import layers
from moe_jax.layers import routers
from tests import test_readme


@pytest.mark.slow
def test_the_router_of_the_examples_halves_its_logits():
  scope = test_readme.run('moe_jax/layers/README.md')
  layer, x = scope['layer'], scope['x']
  params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x))['params']
  usual = layers.MoE(
    dataclasses.replace(
      layer.options, router=routers.TokenChoice(gates='sigmoid')
    )
  )
  half = {'w': params['router']['w'] / 2}
  expected = usual.apply({'params': {**params, 'router': half}}, x)
  tempered = layer.apply({'params': params}, x)
  jax.tree.map(np.testing.assert_array_equal, tempered, expected)
