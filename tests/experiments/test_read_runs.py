"""Measures of leaks, and rows that are read token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import glam_capacity, routing_rules
from tests import tiny_study

T, B = 12, 5
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


@functools.cache
def ten_rows():
  """A run and a state of random parameters, as `measure` reads them."""
  moe = dict(capacity=dict(kind='all'), num_selected=2)
  stream = np.random.default_rng(0).integers(0, 257, 2 * B * T + 1)
  # One of ten rows has two documents.
  starts = [0, 2 * T, 2 * T + 3, 3 * T]
  return tiny_study.measured_run(moe, starts, stream, T)


def test_without_drops_the_loss_is_that_of_whole_rows():
  run, params = ten_rows()
  batch = jax.tree.map(jnp.asarray, glam_capacity.whole_rows(run, B))
  assert (batch['segment_ids'] == 1).all()
  apply = jax.jit(run.model.apply)
  logits, _ = apply({'params': params}, **run.model.inputs(batch))
  by_step, _ = glam_capacity.read(
    glam_capacity.stepping_model(run, 0), {'params': params}, batch['tokens']
  )
  np.testing.assert_allclose(by_step, logits, atol=1e-4)
  assert glam_capacity.measure_steps(run, params, 0, B)['dropped'] == 0


def test_the_rows_of_a_step_compete_for_slots():
  # Five rows make ten choices among four experts of one slot each.
  run, params = ten_rows()
  metrics = glam_capacity.measure_steps(run, params, 1, B)
  assert 0.59 < metrics['dropped'] < 0.9
  free = glam_capacity.measure_steps(run, params, 0, B)
  assert abs(metrics['loss'] - free['loss']) > 1e-3


def test_too_few_rows_are_refused():
  with pytest.raises(ValueError, match='num_rows=10, but 9 rows'):
    glam_capacity.whole_rows(ten_rows()[0], 10)
