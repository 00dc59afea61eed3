"""Merging and pruning behind routers by task, checked by logits."""

import jax
import numpy as np
import pytest

from moe_jax.compression.fewer import SmallerLayer, smaller
from moe_jax.models.expert_arrays import sparse_layers
from tests.compression.sparse_runs import in_memory
from tests.compression.test_extract import KINDS, N, logits, options_of

REMAINING, LOST = [0, 1, 2, 4], 3


def run_of(change):
  """A decoder whose params are changed by change(name of the leaf, leaf)."""
  return in_memory(
    options_of(**KINDS['decoder']),
    lambda params: jax.tree_util.tree_map_with_path(
      lambda path, leaf: change(path[-1].key, leaf), params
    ),
  )


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
  other_run = run_of(lambda _, leaf: leaf)
  made = smaller(run, smaller_layers)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    assert_same_logits(other_run, *made)
