"""Statistics of experts against a loop over tokens, and scores of experts."""

import functools

import jax
import numpy as np
import pytest

from moe_jax.compression import calibration
from moe_jax.compression.calibration import capture
from moe_jax.layers.routers import ExpertChoice
from tests.compression import sparse_runs
from tests.compression.sparse_runs import E, K, M


@functools.cache
def measured():
  run = sparse_runs.run_of()
  return run, sparse_runs.calibrated(run)


def test_statistics_are_those_of_a_loop_over_tokens():
  run, calibrated = measured()
  params = run.model.stacks.layer_trees(run.variables['params'])
  expected = {
    n: dict(
      tokens=0,
      choices=np.zeros(E),
      gate=np.zeros(E),
      gated_norm=np.zeros(E),
      output=np.zeros((E, M)),
    )
    for n in (1, 2)
  }
  for batch in sparse_runs.BATCHES:
    for n, inputs in capture(run.model, run.variables, batch).items():
      p = jax.tree.map(np.asarray, params[n]['moe']['experts'])
      is_real = np.asarray(batch['segment_ids']) > 0
      for token in np.argwhere(is_real):
        x, sums = np.asarray(inputs.x)[tuple(token)], expected[n]
        h = x @ p['w_in'] + p['b_in']
        gated = x @ p['w_gate']
        h *= gated / (1 + np.exp(-gated))
        y = np.einsum('ef,efm->em', h, p['w_out']) + p['b_out']
        sums['tokens'] += 1
        sums['output'] += y
        for k in range(K):
          e = int(inputs.routing.expert_index[tuple(token)][k])
          gate = float(inputs.routing.gate[tuple(token)][k])
          sums['choices'][e] += 1
          sums['gate'][e] += gate
          sums['gated_norm'][e] += gate * np.linalg.norm(y[e])
  for n, sums in expected.items():
    for name, value in sums.items():
      np.testing.assert_allclose(
        getattr(calibrated.usage[n], name), value, rtol=1e-4, atol=1e-4
      )


def test_scores_are_of_all_tokens_or_of_those_of_an_expert():
  sums = calibration.Usage(
    tokens=np.float64(10),
    choices=np.array([8.0, 2, 0]),
    gate=np.array([4.0, 1.5, 0]),
    gated_norm=np.array([16.0, 12, 0]),
    output=np.ones((3, 2)),
  )
  scores = {n: list(score(sums)) for n, score in calibration.SCORES.items()}
  assert scores == {
    'usage': [0.8, 0.2, 0],
    'gate': [0.4, 0.15, 0],
    'reap': [2, 6, 0],
  }
  assert sums.unused == [2]
  np.testing.assert_allclose(sums.mean_output, 0.1)


def test_no_batches_are_refused():
  run, _ = measured()
  with pytest.raises(ValueError, match='there are no batches'):
    calibration.measure(run.model, run.variables, [])


def test_experts_that_choose_tokens_are_refused():
  run = sparse_runs.run_of(router=ExpertChoice())
  with pytest.raises(ValueError, match='experts of layer 1 choose tokens'):
    calibration.measure(run.model, run.variables, [])
