"""Every config: its text, its size, and two steps of it shrunk."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import models, run_config
from moe_jax.analysis import cost
from moe_jax.config import merge, section_of
from moe_jax.models.pattern import sparse_pattern
from moe_jax.training.evaluate import differing_parameters
from moe_jax.training.programs import make_programs
from tests import golden
from tests.training import tiny


@functools.cache
def options_of(name, *arguments):
  """The options of the config of a name, read once."""
  return run_config.read(golden.config(name, *arguments))


def batch_of(options, model):
  """Random rows of the run's lengths, for every input of the model."""
  rows = tiny.batch(options)
  if not options.model.has_encoder:
    return rows
  encoder = {
    f'encoder_{name}': rows[name]
    for name in ('tokens', 'segment_ids', 'positions')
  }
  target = tiny.rows(options.batch_size, options.data.target_len, seed=1)
  return target | encoder


@pytest.mark.parametrize('name', golden.NAMES)
def test_dump(name):
  expected = (golden.FOLDER / f'{name}.json').read_text()
  assert golden.dump(name) == expected, (
    'the config changed; if that is meant: python -m tests.golden'
  )


# Others differ from these in what `tests/models` checks.
FAMILIES = ('deepseek_v3', 'mixtral_8x7b', 'shazeer_lstm', 'tiny_seq2seq')


def check_at_full_size(name):
  """A config's model initialises, and so do those of its evaluations."""
  options = options_of(name).filled(65)
  model = options.build()
  shapes = nn.meta.unbox(models.abstract_params(model))
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert total > 500_000, name
  # Memory is refused by this count, which takes no time.
  assert 0.85 * total < options.model.least_parameters() <= total, name
  for entry in options.evals.values():
    changed = entry.overridden(options.model).build(options.sharding.rules)
    assert not differing_parameters(model, changed), name


@pytest.mark.parametrize('name', FAMILIES)
def test_initialises_as_shapes_at_full_size(name):
  check_at_full_size(name)


@pytest.mark.slow
def test_the_other_configs_initialise_as_shapes_at_full_size():
  for name in {*golden.NAMES} - {*FAMILIES}:
    check_at_full_size(name)


def with_few_layers(options):
  """Options with two layers in place of periods of four, which take long."""
  model = options.model
  if model.moe.layers != 'every 4':
    return options
  moe = dataclasses.replace(model.moe, layers='every 2')
  model = dataclasses.replace(model, num_layers=2, moe=moe)
  return dataclasses.replace(options, model=model)


# The kinds of models and optimizers, and the routers, attention and positions
# that need the most of a step, are in these. What else is in a config is traced
# above at full size, and trained in tests of its own.
@pytest.mark.parametrize(
  'name',
  [
    'tiny_switch',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('deepseek_v3', 'shazeer_lstm', 'st_moe_32b')
    ),
  ],
)
def test_two_steps_shrunk(name):
  options = with_few_layers(options_of(name, 'runlocal').filled(257))
  model = options.build()
  mesh = options.mesh.make(jax.devices()[:1])
  programs = make_programs(options, model, mesh)
  state, loss_values = tiny.first_state(programs), []
  batch = programs.put(jax.device_get(batch_of(options, model)))
  for _ in range(2):
    state, metrics = programs.train_step(state, batch)
    loss_values.append(float(metrics.loss))
  assert int(state.step) == 2
  assert np.isfinite(loss_values).all()
  assert loss_values[0] != loss_values[1]


def test_shrinking_keeps_what_is_sparse():
  model = options_of('deepseek_v3', 'runlocal').model
  assert sparse_pattern(model.moe.layers, model.num_layers) == (0, 1, 1)
  assert (model.moe.num_experts, model.moe.num_selected) == (4, 2)
  assert model.moe.router.expert_groups == 2


@pytest.mark.parametrize('name', golden.NAMES)
def test_a_shrunk_config_is_small_and_of_the_same_kinds(name):
  whole, small = options_of(name), options_of(name, 'runlocal')
  assert type(small.model) is type(whole.model)
  assert small.evals.keys() == whole.evals.keys()
  assert type(small.data.task) is type(whole.data.task)
  assert small.total_steps == 2 and small.batch_size == 4
  assert small.model.width == 32 and small.data.seq_len == 32
  assert type(small.model.moe.router) is type(whole.model.moe.router)
  assert small.model.vocab_size == 0
  # The result is a valid config.
  assert run_config.read(section_of(small)) == small


def test_arguments_name_published_sizes():
  assert golden.config('switch_base', 'e8').model.moe.num_experts == 8
  assert golden.config('switch_base', 'e256').model.moe.num_experts == 256
  large = golden.config('st_moe_base', 'large').model
  assert (large.num_layers, large.moe.num_experts) == (24, 32)
  two_levels = golden.config('shazeer_lstm', 'MoE-256-h').model.moe
  assert two_levels.router.hierarchical.branching == 16
  with pytest.raises(ValueError, match=r"'e7'.* have .*'e64'"):
    golden.config('switch_base', 'e7')


def test_only_glam_leaks_the_future():
  leaking = [
    name
    for name in golden.NAMES
    if options_of(name).filled(65).build().stacks.leaks_future
  ]
  assert leaking == ['glam_64b64e']


def test_the_dense_twin_is_one_override():
  config = golden.config('shakespeare_gshard')
  twin = run_config.read(merge(config, {'model': {'moe': {'num_experts': 0}}}))
  sizes = [
    cost.count(options.filled(65).build(), 7).total_params
    for options in (twin, options_of('shakespeare_dense'))
  ]
  assert sizes[0] == sizes[1]
