"""FLOPs of loops, from one and two periods of each."""

import jax
import pytest

from moe_jax import models
from moe_jax.analysis import periods
from moe_jax.config import merge
from moe_jax.partitioning import make_mesh
from moe_jax.training import setup
from moe_jax.training.abstract import abstract_batch
from tests.training import tiny


def flops(config):
  """Of the step as it is lowered, which takes no compiler."""
  mesh = make_mesh({'data': 1}, jax.devices()[:1])
  programs = setup.make_programs(config, models.build(config), mesh)
  lowered = programs.train_step.lower(
    programs.abstract_state, abstract_batch(config)
  )
  return float(lowered.cost_analysis()['flops'])


def config_of(**model):
  config = tiny.config(batch_size=4, model=model)
  return setup.with_vocabulary(config, 257)


def test_extrapolated_is_what_the_unrolled_model_has():
  looped = config_of(num_layers=4, moe={'layers': 'all'})
  whole = flops(merge(looped, {'model': {'scan_layers': False}}))
  assert periods.extrapolate(looped, flops) == pytest.approx(whole, rel=1e-3)


def test_microbatches_repeat_all_but_the_optimizer():
  config = tiny.config(batch_size=12, microbatches=3)

  def count(short):
    assert short.microbatches == 1
    return 7.0 + short.batch_size * short.model.num_layers

  layers = config.model.num_layers
  assert periods.extrapolate(config, count) == 7 + 12 * layers


def test_both_halves_have_their_own_loops():
  config = config_of(
    kind='encoder_decoder',
    num_layers=6,
    num_encoder_layers=11,
    moe={'layers': 'every 2', 'encoder_layers': 'last 1'},
  )
  seen = []

  def record(short):
    m = short.model
    seen.append(
      (m.num_layers, m.moe.layers, m.num_encoder_layers, m.moe.encoder_layers)
    )
    assert not m.scan_layers
    # A layer of the decoder costs 10, one of the encoder 1.
    return 100.0 + 10 * m.num_layers + m.num_encoder_layers

  assert periods.extrapolate(config, record) == 100 + 60 + 11
  # 'last 1' of eleven is a loop of ten dense layers, and one more.
  assert seen == [
    (2, '1', 2, '1'),
    (4, '1,3', 2, '1'),
    (2, '1', 3, '2'),
  ]
