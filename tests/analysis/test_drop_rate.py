"""The report, training's metrics and evaluations agree on the drop rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import data
from moe_jax.analysis import hooks
from moe_jax.runs import summary
from moe_jax.runs.summary import add
from moe_jax.training import setup
from moe_jax.training.evaluate import Losses
from tests.training import tiny

BATCHES = 8  # as many as the report reads


def options(threshold, capacity):
  """A run of two choices; a second choice is sent depending on its gate."""
  router = {
    'gates': 'renormalized',
    'second_policy': 'threshold',
    'second_threshold': threshold,
  }
  moe = {
    'num_selected': 2,
    'layers': 'all',
    'router': {'token_choice': router},
    'capacity': capacity,
  }
  return tiny.options(
    model={'moe': moe}, checkpoint={'keep_best': False}, evals={}
  )


def rates(options, folder):
  """Drop rates of each layer by the report, by evaluation and by training.

  All three see the same parameters and rows. The share of second choices that
  training did not send is returned too.
  """
  run = setup.set_up(options, folder, devices=jax.devices()[:1])
  state, rows = run.programs.init_state(), run.dataset.splits['validation']
  layers, _ = hooks.routing_tables(run, state)
  eval_metrics = Losses(
    model=run.model,
    num_batches=BATCHES,
    rows=rows,
    put=run.programs.put,
  )(run.programs.variables(state), 0)
  total = None
  for batch in data.eval_batches(
    rows, batch_size=options.batch_size, num_batches=BATCHES
  ):
    (_, sums), _ = tiny.grads_of(
      options, state.params, jax.tree.map(jnp.asarray, batch)
    )
    sums = summary.host(sums)
    total = sums if total is None else add(total, sums)
  train_metrics = summary.summarize(total, run.model.stacks.moes)
  keys = [
    'drop_rate', 'drop_rate_choice_1', 'drop_rate_choice_2'
  ]  # fmt: skip
  names = 'dropped', 'choice 1', 'choice 2'
  report_rates = [[row[name] for name in names] for row in layers.rows]
  metric_rates = [
    [[metrics[f'layer_{i}/{key}'] for key in keys] for i in range(2)]
    for metrics in (eval_metrics, train_metrics)
  ]
  unsent = [train_metrics[f'layer_{i}/unsent_rate_choice_2'] for i in range(2)]
  return np.array([report_rates, *metric_rates]), np.array(unsent)


@pytest.mark.slow
def test_choices_of_full_experts_are_dropped_alike(tmp_path):
  # The threshold is so low that every second choice is sent.
  capacity = {'kind': 'per_token', 'per_token': {'factor': 1.0}}
  drop_rates, unsent = rates(options(1e-6, capacity), tmp_path)
  assert (unsent == 0).all()
  # Each token has two choices, and capacity is for one.
  assert (drop_rates[0, :, 0] >= 0.5).all()
  np.testing.assert_allclose(drop_rates[1], drop_rates[0], rtol=1e-6)
  np.testing.assert_allclose(drop_rates[2], drop_rates[0], rtol=1e-6)
