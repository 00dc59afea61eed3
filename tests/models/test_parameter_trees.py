"""Shapes and values of parameters, which no length of a row changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import models
from tests.models import tiny


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['decoder', 'encoder_decoder'])
def test_parameters_are_those_of_rows_of_any_length(kind):
  model = tiny.build(kind=kind)
  key = tiny.key(3)
  tokens = jnp.asarray(tiny.tokens())  # T=10
  inputs = {f'{prefix}tokens': tokens for prefix in model.stacks.sequences}
  expected = jax.jit(lambda key: model.init(key, **inputs))(key)['params']
  params = models.init_params(model, key)
  for name, leaf in tiny.leaves(nn.meta.unbox(params)).items():
    expected_leaf = tiny.leaves(nn.meta.unbox(expected))[name]
    np.testing.assert_array_equal(leaf, expected_leaf, err_msg=name)
  shapes = nn.meta.unbox(models.abstract_params(model))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
    jnp.shape, nn.meta.unbox(expected)
  )


def test_a_caller_may_change_the_shapes_that_it_gets():
  model = tiny.build()
  shapes = models.abstract_params(model)
  names = set(shapes)
  shapes.clear()
  assert set(models.abstract_params(model)) == names != set()


class Table(models.Model):
  """A user's model whose field, an array, has no hash."""

  table: np.ndarray

  def inputs(self, batch):
    return {'tokens': batch['tokens']}

  @nn.compact
  def __call__(self, tokens):
    return nn.Dense(5)(jnp.asarray(self.table)[tokens])


def test_a_model_without_a_hash_has_shapes_too():
  model = Table(np.ones((4, 7), np.float32))
  with pytest.raises(TypeError):
    hash(model)
  shapes = models.abstract_params(model)
  assert shapes['Dense_0']['kernel'].shape == (7, 5)
