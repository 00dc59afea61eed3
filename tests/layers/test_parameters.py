"""Boxes of parameters: their contents, and how they are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import Gpt2, Numerics, Shared, parameters
from moe_jax.layers.shared import FanIn
from tests.models import tiny

ROLE = 'ffn'


class Layer(nn.Module):
  """A layer with a parameter in our box, one without and one in linen's."""

  @nn.compact
  def __call__(self, x):
    init = parameters.kernel(Shared(), ('embed', 'mlp'), role=ROLE)
    x = x @ self.param('own', init, (4, 4))
    x = x @ self.param('plain', nn.initializers.ones, (4, 4))
    init = nn.with_logical_partitioning(nn.initializers.zeros, ('mlp',))
    return x + self.param('linen', init, (4,))[None]


def test_axes_and_roles_survive_a_scan_over_layers():
  stacked = nn.scan(
    lambda layer, x, _: (layer(x), None),
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=3,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  layers = nn.init(lambda layer, x: stacked(layer, x, None), Layer())
  boxed = jax.eval_shape(layers, jax.random.key(0), jnp.ones((2, 4)))['params']
  assert parameters.axes_of(boxed) == {
    'own': ('layers', 'embed', 'mlp'),
    'plain': (None, None, None),
    'linen': ('layers', 'mlp'),
  }
  assert parameters.roles_of(boxed) == {
    'own': (ROLE, 'kernel'), 'plain': ('', ''), 'linen': ('', ''),
  }  # fmt: skip


def test_the_parent_gives_roles_to_those_without():
  shapes = jax.eval_shape(Layer().init, jax.random.key(0), jnp.ones((2, 4)))
  params = parameters.with_role(shapes['params'], 'expert')
  assert parameters.roles_of(params) == {
    'own': (ROLE, 'kernel'),
    'plain': ('expert', 'kernel'),
    'linen': ('expert', 'bias'),
  }
  assert parameters.axes_of(params)['linen'] == ('mlp',)


@pytest.mark.parametrize('init', [FanIn(), Gpt2()])
def test_what_shrinks_a_kernel_shrinks_it_whatever_the_distribution(init):
  shared = Shared(Numerics(init=init))

  def deviation(**options):
    make = parameters.kernel(shared, ('embed', 'mlp'), role=ROLE, **options)
    return np.std(make(tiny.key(0), (64, 64)).unbox())

  # The random numbers are the same, at a third of the scale.
  np.testing.assert_allclose(deviation(shrink=9.0), deviation() / 3, rtol=1e-5)
