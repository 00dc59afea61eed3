"""Rows that are read token by token, against rows that are read at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import glam_capacity
from tests import tiny_study

T, B = 6, 5


@functools.cache
def prepared():
  """A run and a state of random parameters, as `measure` reads them."""
  moe = dict(capacity=dict(kind='all'), num_selected=2)
  stream = np.random.default_rng(0).integers(0, 257, 2 * B * T + 1)
  # One of ten rows has two documents.
  starts = [0, 2 * T, 2 * T + 3, 3 * T]
  return tiny_study.measured_run(moe, starts, stream, T)


def test_without_drops_the_loss_is_that_of_whole_rows():
  run, params = prepared()
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
  run, params = prepared()
  metrics = glam_capacity.measure_steps(run, params, 1, B)
  assert 0.59 < metrics['dropped'] < 0.9
  free = glam_capacity.measure_steps(run, params, 0, B)
  assert abs(metrics['loss'] - free['loss']) > 1e-3


def test_too_few_rows_are_refused():
  with pytest.raises(ValueError, match='num_rows=10, but 9 rows'):
    glam_capacity.whole_rows(prepared()[0], 10)
