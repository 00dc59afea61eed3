"""No number depends on the name of a parameter or of a module."""

import pytest

from moe_jax.analysis import cost, counts, memory
from moe_jax.layers.positions import Relative
from moe_jax.models.trees import (
  ParameterTrees,
  describe,
  flatten,
  unflatten,
)
from tests.models import tiny
from tests.models.tiny import B, T


def figures(model):
  """All numbers that are counted for a model."""
  target_len = 7 if model.has_encoder else 0
  return (
    cost.count(model, T, target_len, B),
    [memory.weight_bytes(model, dtype) for dtype in memory.DTYPES],
    cost.without_vocabulary(model, T),
  )


@pytest.mark.parametrize(
  'model',
  [
    tiny.build(kind='encoder_decoder', positions=Relative()),
    tiny.build(dict(layers='1'), kind='lstm', num_layers=3),
  ],
  ids=['encoder_decoder', 'lstm'],
)
def test_names_may_be_scrambled(model, monkeypatch):
  before, new_names = figures(model), {}
  # The stacks' scopes keep their names.
  scopes = {stack.path for stack in model.stacks if stack.blocks}

  def new_path(path):
    return tuple(
      name
      if path[: i + 1] in scopes
      else new_names.setdefault(name, f'name_{len(new_names)}')
      for i, name in enumerate(path)
    )

  def scrambled(tree):
    return unflatten({new_path(path): x for path, x in flatten(tree).items()})

  trees = ParameterTrees(*map(scrambled, describe(model)))
  monkeypatch.setattr(counts, 'describe', lambda model: trees)
  assert figures(model) == before
  assert len(new_names) > 10
