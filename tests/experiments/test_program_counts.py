"""Counts of programs; FLOPs of loops from models of one and two periods."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import program_counts
from moe_jax.partitioning import make_mesh
from moe_jax.training import programs
from tests.training import tiny


def flops(options):
  """FLOPs of the lowered step, which is not compiled."""
  mesh = make_mesh({'data': 1}, jax.devices()[:1])
  model = options.build()
  compiled = programs.make_programs(options, model, mesh)
  lowered = compiled.train_step.lower(
    compiled.abstract_state, options.batch_shapes(model)
  )
  return float(lowered.cost_analysis()['flops'])


def options_of(**overrides):
  return tiny.options(batch_size=4, **overrides).filled(257)


def test_counts_of_a_product():
  x, w = jnp.ones((6, 5)), jnp.ones((5, 7))
  counts = program_counts.counts(jax.jit(jnp.matmul).lower(x, w).compile())
  assert counts['xla_flops'] == pytest.approx(2 * 6 * 5 * 7, rel=0.05)
  assert counts['argument_bytes'] == 4 * (6 * 5 + 5 * 7)
  assert counts['output_bytes'] == 4 * 6 * 7
  assert counts['xla_bytes'] >= 4 * (6 * 5 + 5 * 7 + 6 * 7)


@pytest.mark.slow
def test_extrapolated_is_what_the_unrolled_model_has():
  model = {'num_layers': 4, 'moe': {'layers': 'all'}}
  looped = options_of(model=model)
  unrolled_flops = flops(options_of(model={**model, 'scan_layers': False}))
  assert program_counts.extrapolate(looped, flops) == pytest.approx(
    unrolled_flops, rel=1e-3
  )


def test_microbatches_repeat_all_but_the_optimizer():
  options = tiny.options(batch_size=12, microbatches=3)

  def count(short):
    assert short.microbatches == 1
    return 7.0 + short.batch_size * short.model.num_layers

  layers = options.model.num_layers
  assert program_counts.extrapolate(options, count) == 7 + 12 * layers


def test_both_halves_have_their_own_loops():
  options = options_of(
    model={
      'kind': 'encoder_decoder',
      'num_layers': 6,
      'moe': {'layers': 'every 2'},
      'encoder': {'num_layers': 11, 'overrides': {'moe': {'layers': 'last 1'}}},
    },
    data={
      'task': {'kind': 'seq2seq'},
      'source': {'kind': 'python_stdlib_docstrings'},
      'target_len': 16,
    },
  )
  short_halves = []

  def record(short):
    decoder, encoder = short.model, short.model.encoder_half
    short_halves.append(
      (
        decoder.num_layers,
        decoder.moe.layers,
        encoder.num_layers,
        encoder.moe.layers,
      )
    )
    assert not decoder.scan_layers and not encoder.scan_layers
    # The fake cost of a decoder layer is 10 and of an encoder layer 1.
    return 100.0 + 10 * decoder.num_layers + encoder.num_layers

  assert program_counts.extrapolate(options, record) == 100 + 60 + 11
  # With 'last 1' eleven layers are a loop of ten dense layers and one sparse
  # layer.
  assert short_halves == [
    (2, '1', 2, '1'),
    (4, '1,3', 2, '1'),
    (2, '1', 3, '2'),
  ]


def test_loops_over_tokens_are_refused():
  options = options_of(
    model={'kind': 'lstm', 'num_layers': 3, 'positions': {'kind': 'none'}}
  )
  with pytest.raises(ValueError, match=r"'lstm' has loops over tokens"):
    program_counts.extrapolate(options, flops)
