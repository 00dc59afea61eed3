"""The measure of leaks: changed outputs, and outputs of prefixes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import routing_rules
from tests import tiny_study

T = 12
MOES = {
  'token_choice': dict(capacity=dict(kind='all')),
  'expert_choice': dict(
    router=dict(kind='expert_choice'),
    capacity=dict(per_token=dict(factor=1.0)),
    allow_future_leak=True,
  ),
}


@functools.cache
def prepared(router: str):
  stream = np.random.default_rng(0).integers(0, 257, 5 * T)
  return tiny_study.measured_run(
    dict(MOES[router], group_size=0), [0, 2 * T + 5], stream, T
  )


@pytest.mark.slow
def test_a_causal_model_has_one_loss():
  metrics = routing_rules.measure(*prepared('token_choice'))
  assert metrics['leak/changed'] == 0
  np.testing.assert_allclose(
    metrics['leak/generated'], metrics['leak/at_once'], rtol=1e-5
  )


def test_expert_choice_leaks():
  metrics = routing_rules.measure(*prepared('expert_choice'))
  assert metrics['leak/changed'] > 0.1
  assert abs(metrics['leak/generated'] - metrics['leak/at_once']) > 1e-3


def test_generated_outputs_are_of_prefixes_alone():
  run, state = prepared('expert_choice')
  rows = run.dataset.splits['validation'].take(np.arange(4))
  batch = {key: jnp.asarray(value) for key, value in rows.items()}

  @jax.jit
  def apply(batch):
    variables = run.programs.variables(state)
    return run.model.apply(variables, **run.model.inputs(batch))[0]

  logits = routing_rules.generated_logits(apply, batch)
  # Row 2 has two documents. The prefix here has its own length, without
  # padding.
  prefix = {key: value[2:3, :7] for key, value in rows.items()}
  np.testing.assert_allclose(
    logits[2, 6], apply(prefix)[0, -1], rtol=1e-3, atol=1e-4
  )
