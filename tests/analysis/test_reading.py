"""Readings: the losses and the choices of a model's own pass."""

import jax
import numpy as np
import pytest

from moe_jax.analysis import reading
from moe_jax.analysis.token_counts import choices
from tests.models import tiny


def batch_of(tokens, seed):
  segment_ids = np.ones_like(tokens)
  segment_ids[0, 5:] = 0
  weights = np.random.default_rng(seed).random(tokens.shape, np.float32)
  return {
    'tokens': tokens,
    'targets': np.roll(tokens, -1, 1),
    'segment_ids': segment_ids,
    'positions': np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)),
    'loss_weights': weights * segment_ids,
  }


def test_losses_and_choices_are_those_of_the_model():
  moe = {'num_experts': 5, 'num_selected': 2}
  model = tiny.build(moe, num_layers=1)
  variables = {'params': tiny.params_of(model)}
  batches = [batch_of(tiny.tokens(seed), seed) for seed in range(2)]

  @jax.jit
  def nats(variables, batch):
    logits, _ = model.apply(variables, **model.inputs(batch))
    return model.loss(logits, batch).nats

  readings = list(reading.readings(model, variables, batches, step=7))
  for number, (batch_reading, batch) in enumerate(
    zip(readings, batches, strict=True)
  ):
    np.testing.assert_allclose(
      batch_reading.nats, nats(variables, batch), atol=1e-5
    )
    np.testing.assert_array_equal(batch_reading.weights, batch['loss_weights'])
    record = batch_reading.record()
    assert (record.kind, record.step, record.batch) == ('read', 7, number)
    (expected,) = choices(model, variables, [batch])
    experts = record.layers[0].expert[batch['segment_ids'] > 0]
    np.testing.assert_array_equal(experts.reshape(-1), expected[0].expert)
    assert (record.layers[0].expert[0, 5:] == -1).all()
    with pytest.raises(ValueError, match="no sparse layer sees 'encoder'"):
      batch_reading.record('encoder')
