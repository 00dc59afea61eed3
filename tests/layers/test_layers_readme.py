"""The examples in the room's README run."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import layers
from moe_jax.layers import routers

README = pathlib.Path(layers.__file__).parent / 'README.md'
TEXT = README.read_text(encoding='utf-8')
LAYER, BLOCK, ROUTER = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


def executed(code, **variables):
  """The variables of an example after it ran."""
  scope = {'__name__': 'readme', **variables}
  exec(compile(code, str(README), 'exec'), scope)
  return scope


def test_a_module_of_ones_own_holds_a_layer_and_is_scanned():
  def example(x):
    scope = executed(BLOCK, jax=jax, layers=layers, routers=routers, x=x)
    return scope['variables'], scope['y']

  x = jax.ShapeDtypeStruct((2, 8, 16), np.float32)
  variables, y = jax.eval_shape(example, x)  # traced, as to run it takes longer
  assert variables['params']['moe']['experts']['w_in'].shape[:3] == (3, 4, 16)
  assert y.shape == x.shape


@pytest.mark.slow
def test_the_examples_run_one_after_the_other():
  scope = executed(LAYER)
  assert scope['y'].shape == scope['x'].shape
  scope = executed(BLOCK, **scope)
  np.testing.assert_array_equal(scope['aux'].stats.load.sum(-1), [16] * 3)
  scope = executed(ROUTER, **scope)
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


def test_every_file_of_the_room_is_named():
  files = {path.name for path in README.parent.glob('*.py')}
  assert [n for n in files - {'__init__.py'} if n not in TEXT] == []
