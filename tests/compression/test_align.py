"""Hidden units in another order: the same layer, and the order is found."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import align
from moe_jax.models.expert_arrays import assembled, sparse_layers
from tests.compression.sparse_runs import E, F, outputs, run_of


def shuffled(layer, seed=0):
  """The experts of a layer with hidden units in orders of their own."""
  rng = np.random.default_rng(seed)
  axes = {path: layer.axes[path][1:] for path in layer.experts}
  experts = {path: np.asarray(x) for path, x in layer.experts.items()}
  shuffled_experts = [
    align.permuted(align.of_expert(experts, e), rng.permutation(F), axes)
    for e in range(E)
  ]
  return {
    path: np.stack([expert[path] for expert in shuffled_experts])
    for path in experts
  }


def test_permuted_experts_give_the_same_layer():
  run = run_of()
  params = run.variables['params']
  layer = sparse_layers(run.model, params)[1]
  assert {path[-1] for path in layer.experts} == {
    'w_in',
    'w_gate',
    'w_out',
    'b_in',
    'b_out',
  }
  shuffled_experts = {
    path: jnp.asarray(x) for path, x in shuffled(layer).items()
  }
  shuffled_params = assembled(
    run.model, params, run.model, {1: shuffled_experts}
  )
  y, _ = outputs(run, 1)
  shuffled_y, _ = outputs(
    run._replace(variables={'params': shuffled_params}), 1
  )
  np.testing.assert_allclose(shuffled_y, y, atol=1e-6)
  # Without the gate's kernel in the same order it is another layer.
  path = ('moe', 'experts', 'w_gate')
  mismatched_params = assembled(
    run.model,
    params,
    run.model,
    {1: {**shuffled_experts, path: layer.experts[path]}},
  )
  mismatched_y, _ = outputs(
    run._replace(variables={'params': mismatched_params}), 1
  )
  assert np.abs(mismatched_y - y).max() > 1e-2


def test_the_order_of_a_permuted_copy_is_found():
  run = run_of()
  layer = sparse_layers(run.model, run.variables['params'])[2]
  copies = {
    path: np.stack([np.asarray(x[0])] * E) for path, x in layer.experts.items()
  }
  mixed = shuffled(layer._replace(experts=copies))
  path = ('moe', 'experts', 'w_in')
  assert (mixed[path][1] != mixed[path][3]).any()
  aligned = align.aligned(mixed, 3, layer.axes)
  for path, x in aligned.items():
    np.testing.assert_array_equal(x, np.stack([mixed[path][3]] * E))


def test_experts_without_hidden_units_are_refused():
  experts = {('scale',): np.ones(3)}
  with pytest.raises(ValueError, match='none of which has hidden units'):
    align.permutation(experts, experts, {('scale',): ('embed',)})
