"""Experts that are alike: hidden units in any order, groups, and means."""

import jax.numpy as jnp
import numpy as np

from moe_jax.compression import merge
from moe_jax.compression.calibration import Usage
from moe_jax.models.expert_arrays import assembled, sparse_layers
from tests.compression import sparse_runs
from tests.compression.sparse_runs import E, F, outputs, run_of


def shuffled(layer, seed=0):
  """The experts of a layer with hidden units in orders of their own."""
  rng = np.random.default_rng(seed)
  orders = [rng.permutation(F) for _ in range(E)]
  experts = {path: np.asarray(x) for path, x in layer.experts.items()}
  for path, x in experts.items():
    if merge.HIDDEN in layer.axes[path]:
      axis = layer.axes[path].index(merge.HIDDEN) - 1
      pairs = zip(x, orders, strict=True)
      experts[path] = np.stack([np.take(y, i, axis) for y, i in pairs])
  return experts


def copies(layer):
  """The experts of a layer, as if all were its first one."""
  first = {path: np.asarray(x[0]) for path, x in layer.experts.items()}
  experts = {path: np.stack([x] * E) for path, x in first.items()}
  return layer._replace(experts=experts)


def test_permuted_experts_give_the_same_layer():
  run = run_of()
  layer = sparse_layers(run.model, run.variables)[1]
  names = {'w_in', 'w_gate', 'w_out', 'b_in', 'b_out'}
  assert {path[-1] for path in layer.experts} == names
  mixed = {path: jnp.asarray(x) for path, x in shuffled(layer).items()}

  def outputs_with(arrays):
    variables = assembled(run.model, run.variables, run.model, {1: arrays})
    return outputs(run._replace(variables=variables), 1)[0]

  y, _ = outputs(run, 1)
  np.testing.assert_allclose(outputs_with(mixed), y, atol=1e-6)
  # Without the gate's kernel in the same order it is another layer.
  path = ('moe', 'experts', 'w_gate')
  mismatched = outputs_with({**mixed, path: layer.experts[path]})
  assert np.abs(mismatched - y).max() > 1e-2


def test_the_order_of_a_permuted_copy_is_found():
  run = run_of()
  layer = sparse_layers(run.model, run.variables)[2]
  mixed = shuffled(copies(layer))
  path = ('moe', 'experts', 'w_in')
  assert (mixed[path][1] != mixed[path][3]).any()
  aligned = merge.aligned(mixed, 3, layer.axes)
  for path, x in aligned.items():
    np.testing.assert_array_equal(x, np.stack([mixed[path][3]] * E))


def test_a_merged_expert_is_the_mean_by_usage_of_aligned_ones():
  calibrated = sparse_runs.calibrated(run_of())
  layer, usage = calibrated.layers[1], calibrated.usage[1]
  usage = usage._replace(choices=np.array([6.0, 0, 2, 0, 0]))
  smaller_layer = merge.merged(layer, usage, ((0, 2), (1, 3), (4,)))
  assert smaller_layer.row == (0, 1, 0, 1, 2)
  b = ('moe', 'experts', 'b_out')  # it has no hidden units to align
  old, new = np.asarray(layer.experts[b]), np.asarray(smaller_layer.arrays[b])
  np.testing.assert_allclose(new[0], 0.75 * old[0] + 0.25 * old[2], rtol=1e-6)
  # Nobody used 1 and 3: their mean is even.
  np.testing.assert_allclose(new[1], (old[1] + old[3]) / 2, rtol=1e-6)
  np.testing.assert_array_equal(new[2], old[4])
  # An expert that no token reached has no weight beside one that is used.
  smaller_layer = merge.merged(layer, usage, ((0, 1), (2,), (3,), (4,)))
  for path, x in smaller_layer.arrays.items():
    np.testing.assert_array_equal(x[0], layer.experts[path][0])


def usage_of(choices, output=None):
  output = np.zeros((len(choices), 1)) if output is None else output
  choices, output = np.array(choices, float), np.array(output, float)
  return Usage(np.float64(10), choices, choices, choices, 10 * output)


# Points on a line: 0 and 1 are near, 5 and 5.4 too, 9 is alone.
POINTS = np.array([0, 5, 1, 9, 5.4])
DISTANCE = np.abs(POINTS[:, None] - POINTS[None])


def test_clusters_are_of_average_linkage_and_exactly_as_many():
  usage = usage_of([1] * 5)
  assert merge.clusters(DISTANCE, usage, 3) == ((0, 2), (1, 4), (3,))
  # 9 is 3.8 from the mean of {5, 5.4}, and that one 4.7 from {0, 1}.
  assert merge.clusters(DISTANCE, usage, 2) == ((0, 2), (1, 3, 4))
  assert merge.clusters(DISTANCE, usage, 5) == tuple((e,) for e in range(5))
  # Equal experts are no reason for fewer groups than asked for.
  assert len(merge.clusters(np.zeros((4, 4)), usage, 3)) == 3


def test_cores_are_the_most_used_whatever_is_near():
  usage = usage_of([5, 4, 1, 1, 6])
  assert merge.cores(DISTANCE, usage, 3) == ((0, 2), (1,), (3, 4))
  # Expert 2, equally near to both cores, joins the lower one.
  tie = np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
  assert merge.cores(tie, usage_of([3, 3, 1]), 2) == ((0, 2), (1,))


def test_similarities_see_outputs_directions_and_weights_in_any_order():
  run = run_of()
  layer = sparse_layers(run.model, run.variables)[1]
  usage = usage_of([1, 2, 3, 1, 1], [[0], [3], [1], [0], [7]])
  by_output = merge.distances(layer, usage, 'outputs')
  assert by_output[1].tolist() == [3, 0, 2, 3, 4]
  columns = dict(layer.columns)
  w = np.asarray(columns['moe', 'router', 'w']).copy()
  w[:, 4], w[:, 3] = 3 * w[:, 1], 0
  columns['moe', 'router', 'w'] = w
  by_router = merge.distances(layer._replace(columns=columns), usage, 'router')
  assert by_router[1, 4] < 1e-6 and by_router[3].tolist() == [1, 1, 1, 0, 1]
  mixed = shuffled(copies(layer))
  by_weight = merge.distances(layer._replace(experts=mixed), usage, 'weights')
  assert not by_weight.any()
