"""Groups of experts that are alike, by hand."""

import numpy as np
import pytest

from moe_jax.compression import grouping
from moe_jax.compression.usage import Usage
from moe_jax.models.expert_arrays import sparse_layers
from tests.compression import sparse_runs
from tests.compression.test_align import shuffled


def usage_of(choices, output=None):
  E = len(choices)
  choices = np.array(choices, float)
  output = np.zeros((E, 1)) if output is None else np.array(output, float)
  return Usage(np.float64(10), choices, choices, choices, 10 * output)


# Points on a line: 0 and 1 are near, 5 and 5.4 too, 9 is alone.
POINTS = np.array([0, 5, 1, 9, 5.4])
DISTANCE = np.abs(POINTS[:, None] - POINTS[None])


def test_clusters_are_of_average_linkage_and_exactly_as_many():
  usage = usage_of([1] * 5)
  assert grouping.clusters(DISTANCE, usage, 3) == ((0, 2), (1, 4), (3,))
  # 9 is 3.8 from the mean of {5, 5.4}, and that one 4.7 from {0, 1}.
  assert grouping.clusters(DISTANCE, usage, 2) == ((0, 2), (1, 3, 4))
  assert grouping.clusters(DISTANCE, usage, 5) == tuple((e,) for e in range(5))
  # Equal experts are no reason for fewer groups than asked for.
  assert len(grouping.clusters(np.zeros((4, 4)), usage, 3)) == 3


def test_cores_are_the_most_used_whatever_is_near():
  usage = usage_of([5, 4, 1, 1, 6])
  assert grouping.cores(DISTANCE, usage, 3) == ((0, 2), (1,), (3, 4))
  # Expert 2, equally near to both cores, joins the lower one.
  tie = np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
  assert grouping.cores(tie, usage_of([3, 3, 1]), 2) == ((0, 2), (1,))


def test_similarities_see_outputs_directions_and_weights_in_any_order():
  run = sparse_runs.run_of()
  layer = sparse_layers(run.model, run.variables['params'])[1]
  usage = usage_of([1, 2, 3, 1, 1], [[0], [3], [1], [0], [7]])
  by_output = grouping.distances(layer, usage, 'outputs')
  assert by_output[1].tolist() == [3, 0, 2, 3, 4]
  columns = dict(layer.columns)
  w = np.asarray(columns['moe', 'router', 'w']).copy()
  w[:, 4], w[:, 3] = 3 * w[:, 1], 0
  columns['moe', 'router', 'w'] = w
  by_router = grouping.distances(
    layer._replace(columns=columns), usage, 'router'
  )
  assert by_router[1, 4] < 1e-6 and by_router[3].tolist() == [1, 1, 1, 0, 1]
  copies = {
    path: np.stack([np.asarray(x)[0]] * 5) for path, x in layer.experts.items()
  }
  mixed = shuffled(layer._replace(experts=copies))
  by_weight = grouping.distances(
    layer._replace(experts=mixed), usage, 'weights'
  )
  assert not by_weight.any()
  with pytest.raises(ValueError, match="unknown group_by 'name'"):
    grouping.distances(layer, usage, 'name')
