"""The measure of leaks: changed outputs, and outputs of prefixes."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import routing_rules
from moe_jax.data import PackedRows
from tests.training import tiny

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
def prepared(router: str, group_size: int = 0):
  """A run and a state of random parameters, as `measure` reads them."""
  moe = dict(MOES[router], layers='all', group_size=group_size)
  options = tiny.options(
    data={'seq_len': T}, model={'num_layers': 1, 'moe': moe}
  )
  stream = np.random.default_rng(0).integers(0, 257, 5 * T)
  rows = PackedRows(stream, np.array([0, 2 * T + 5]), T)
  run = types.SimpleNamespace(
    options=options,
    model=tiny.model_of(options),
    dataset=types.SimpleNamespace(splits={'validation': rows}),
    programs=types.SimpleNamespace(variables=lambda state: {'params': state}),
  )
  # Parameters are larger than initial ones: experts must differ for a leak to
  # show.
  params = jax.tree.map(lambda x: 3 * x, tiny.params_of(options))
  return run, params


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


def test_groups_of_several_rows_are_refused():
  with pytest.raises(ValueError, match='group_size=-1 has several rows'):
    routing_rules.measure(*prepared('token_choice', group_size=-1))
