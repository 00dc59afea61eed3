"""Merging and pruning behind routers by task, checked by logits."""

import pathlib

import jax
import numpy as np
import pytest

from moe_jax.compression.fewer import SmallerLayer, smaller
from moe_jax.data import DataOptions
from moe_jax.models.expert_arrays import sparse_layers
from moe_jax.partitioning import ShardingOptions
from moe_jax.training.trained import Described, Loaded
from tests.compression.test_extract import KINDS, N, logits, options_of
from tests.models import tiny

REMAINING, LOST = [0, 1, 2, 4], 3


def run_of(change):
  """A decoder whose params are changed by change(name of the leaf, leaf)."""
  options = options_of(**KINDS['decoder'])
  model = options.build()
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: change(path[-1].key, leaf), tiny.params_of(model)
  )
  described = Described(options, DataOptions(), ShardingOptions(), 3, None)
  return Loaded(pathlib.Path('run'), described, model, {'params': params}, 1)


def assert_same_logits(run, options, variables):
  model, params = options.build(), variables['params']
  for task in range(N):
    expected = logits(run.model, run.variables['params'], task)
    np.testing.assert_allclose(
      logits(model, params, task), expected, rtol=1e-5, atol=1e-5
    )


def test_equal_experts_are_merged_without_a_change():
  def twins(name, leaf):
    of_expert = name in ('w_in', 'w_out', 'b_in', 'b_out') and leaf.ndim > 2
    return leaf.at[:, LOST].set(leaf[:, 1]) if of_expert else leaf

  run = run_of(twins)
  layers = sparse_layers(run.model, run.variables)
  groups = ((0,), (1, 3), (2,), (4,))  # column 3 leads to expert 1
  index = np.array(REMAINING)
  smaller_layers = {
    n: SmallerLayer(groups, {p: x[index] for p, x in layer.experts.items()})
    for n, layer in layers.items()
  }
  assert_same_logits(run, *smaller(run, smaller_layers))
  # Behind the same columns, experts that differ change the logits.
  with pytest.raises(AssertionError):
    assert_same_logits(
      run_of(lambda _, leaf: leaf), *smaller(run, smaller_layers)
    )
