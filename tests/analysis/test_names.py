"""No number depends on the name of a parameter or of a module."""

import pytest

from moe_jax.analysis import cost, counts, memory
from moe_jax.layers.positions import Relative
from moe_jax.models.trees import ParameterTrees, describe
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
  paths = {stack.path for stack in model.stacks if stack.blocks}
  before = figures(model)
  new_names = {}

  def scramble(tree, path=()):
    """The tree with other names, except those of the stacks' scopes."""
    if not isinstance(tree, dict):
      return tree
    new_subtree = {}
    for name, value in tree.items():
      new_name = name
      if (*path, name) not in paths:
        new_name = new_names.setdefault(name, f'name_{len(new_names)}')
      new_subtree[new_name] = scramble(value, (*path, name))
    return new_subtree

  trees = describe(model)
  trees = ParameterTrees(*map(scramble, trees))
  monkeypatch.setattr(counts, 'describe', lambda model: trees)
  assert figures(model) == before
  assert len(new_names) > 10
