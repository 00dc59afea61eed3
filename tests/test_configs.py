"""Every config: its text, its size, and two steps of it shrunk."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh

from moe_jax import models, run_config
from moe_jax.config import merge, section_of
from moe_jax.configs import t5_base
from moe_jax.models.pattern import sparse_pattern
from moe_jax.models.trees import init_router_state, move_router_state
from moe_jax.training import losses, step
from moe_jax.training.evaluate import differing_parameters
from tests import golden
from tests.training import tiny


def read(config):
  """Reads the options of a config."""
  return run_config.read(config)


@functools.cache
def options_of(name, *arguments):
  """The options of the config of a name, read once."""
  return read(golden.config(name, *arguments))


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


def test_a_dump_holds_what_differs_and_nothing_else():
  changed = json.loads(golden.dump('shakespeare_gshard'))
  assert changed['model.moe.num_selected'] == 2
  assert 'model.moe.router.kind' not in changed  # it is the default
  assert changed['evals.capacity_2.model_overrides'] == {
    'moe': {'capacity': {'kind': 'per_token', 'per_token': {'factor': 4.0}}}
  }
  assert json.loads(golden.dump('shazeer_lstm'))['evals.all_tokens'] is None


# Shrunk they differ from `mixtral_8x7b`, `tiny_switch` and `tiny_seq2seq` in
# what `tests/models` checks; most of their time is compiling.
SIBLINGS = (
  'deepseek_moe_16b',
  'deepseek_v2_lite',
  'finetune',
  'glam_64b64e',
  'gpt_oss_20b',
  'granite_1b_a400m',
  'instruct',
  'kudugunta_multilingual',
  'nllb_moe_54b',
  'olmoe_1b_7b',
  'openmoe_8b',
  'qwen3_30b_a3b',
  'shakespeare_dense',
  'shakespeare_gshard',
  'shakespeare_switch',
  'shazeer_multilingual',
  'st_moe_32b',
  'st_moe_base',
  'switch_base',
  'switch_c',
  't5_base',
  'tiny_finegrained',
)


def each_of(names, slow=SIBLINGS):
  return pytest.mark.parametrize(
    'name',
    [
      pytest.param(name, marks=pytest.mark.slow if name in slow else ())
      for name in names
    ],
  )


each_config = each_of(golden.NAMES)
# The kinds of models and optimizers, and the routers, attention and positions
# that need the most of a step, are in these. What else is in a config is traced
# below at full size, and trained in tests of its own.
each_family = each_of(
  [
    'deepseek_v3',
    'shazeer_lstm',
    'st_moe_32b',
    'tiny_switch',
  ],
  slow=('deepseek_v3', 'shazeer_lstm', 'st_moe_32b'),
)


@each_config
def test_initialises_as_shapes_at_full_size(name):
  options = options_of(name).filled(65)
  model = options.build()
  shapes = nn.meta.unbox(models.abstract_params(model))
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert total > 500_000
  # Memory is refused by this count, which takes no time.
  assert 0.85 * total < options.model.least_parameters() <= total
  for entry in options.evals.values():
    changed = entry.overridden(options.model).build(options.sharding.rules)
    assert not differing_parameters(model, changed)


def with_few_layers(options):
  """Options with two layers in place of periods of four, which take long."""
  model = options.model
  if model.moe.layers != 'every 4':
    return options
  moe = dataclasses.replace(model.moe, layers='every 2')
  model = dataclasses.replace(model, num_layers=2, moe=moe)
  return dataclasses.replace(options, model=model)


@each_family
def test_two_steps_shrunk(name):
  options = with_few_layers(options_of(name, 'runlocal').filled(257))
  model = options.build()
  batch = batch_of(options, model)
  trees = models.describe(model)
  optimizer = options.optimizer.transformation(
    options.total_steps, trees.axes, trees.roles
  )

  @jax.jit
  def first_state(seed):
    params = nn.meta.unbox(models.init_params(model, jax.random.key(seed)))
    opt_state, step_number = optimizer.init(params), jnp.zeros((), jnp.int32)
    routers = init_router_state(model)
    return step.TrainState(step_number, seed, params, opt_state, routers)

  state = first_state(jnp.asarray(options.seed, jnp.uint32))
  weights = losses.loss_weights(model, options.logits_z_weight)
  jitted_step = jax.jit(
    functools.partial(
      step.train_step,
      grad_fn=step.make_grad_fn(model, weights, options.microbatches),
      normalize=functools.partial(losses.normalizers, model),
      optimizer=optimizer,
      rate=optax.constant_schedule(0.0),
      move_router_state=functools.partial(move_router_state, model.stacks),
    )
  )
  loss_values = []
  for _ in range(2):
    state, metrics = jitted_step(state, batch)
    loss_values.append(float(metrics.loss))
  assert int(state.step) == 2
  assert np.isfinite(loss_values).all()
  assert loss_values[0] != loss_values[1]


def test_shrinking_keeps_what_is_sparse():
  model = options_of('openmoe_8b', 'runlocal').model
  assert sparse_pattern(model.moe.layers, model.num_layers)[-1]
  assert model.moe.num_experts == 4
  model = options_of('deepseek_v3', 'runlocal').model
  assert sparse_pattern(model.moe.layers, model.num_layers) == (0, 1, 1)
  assert (model.moe.num_experts, model.moe.num_selected) == (4, 2)
  assert model.moe.router.expert_groups == 2
  with pytest.raises(ValueError, match="unknown config argument 'laptop'"):
    golden.config('tiny_switch', 'laptop')


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
  assert read(section_of(small)) == small


def test_arguments_name_published_sizes():
  assert golden.config('switch_base').model.moe.num_experts == 128
  assert golden.config('switch_base', 'e8').model.moe.num_experts == 8
  assert golden.config('switch_base', 'e256').model.moe.num_experts == 256
  large = golden.config('st_moe_base', 'large').model
  assert (large.num_layers, large.moe.num_experts) == (24, 32)
  two_levels = golden.config('shazeer_lstm', 'MoE-256-h').model.moe
  assert two_levels.router.hierarchical.branching == 16
  for name, argument in (
    ('switch_base', 'e64'),
    ('st_moe_base', 'large'),
    ('shazeer_lstm', 'MoE-34M'),
  ):
    with pytest.raises(ValueError, match=f"'e7'.* have .*'{argument}'"):
      golden.config(name, 'e7')


def test_the_docstring_of_t5_says_where_its_rate_is_not_the_published_one():
  options = options_of('t5_base')
  rate = options.optimizer.rate(options.total_steps)
  differing = [
    step
    for step in (1, 5000, 10_000, 10_001, 250_000)
    if abs(float(rate(jnp.int32(step - 1))) * max(step, 10_000) ** 0.5 - 1)
    > 0.001  # T5: 1 / sqrt(max(step, 10,000))
  ]
  assert differing == [1, 5000]
  assert 'from step 10,000 on' in ' '.join(t5_base.__doc__.split())


def test_switch_c_takes_more_devices_along_tensor_or_with_larger_batches():
  options = options_of('switch_c')

  def check(num_devices, options, **sizes):
    shape = {'data': 1, 'fsdp': 1, 'expert': 128, 'tensor': 1, **sizes}
    assert math.prod(shape.values()) == num_devices
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
    options.check_rows(options.sharding.row_parts(mesh))

  check(128, options)
  check(256, options, tensor=2)
  check(512, options, tensor=4)
  check(256, dataclasses.replace(options, batch_size=4096), fsdp=2)
  with pytest.raises(
    ValueError, match=r'128 groups .* 256 devices .*mesh\.tensor'
  ):
    check(256, options, fsdp=2)


def test_only_glam_leaks_the_future():
  leaking = [
    name
    for name in golden.NAMES
    if options_of(name).filled(65).build().stacks.leaks_future
  ]
  assert leaking == ['glam_64b64e']


def test_a_config_comes_back_locked():
  config = golden.config('tiny_switch')
  with pytest.raises(AttributeError):
    config.model.moe.num_expertz = 4
  with pytest.raises(ValueError, match=r"did you mean 'model.width'"):
    merge(config, {'model': {'widht': 4}})


def test_the_dense_twin_is_one_override():
  config = golden.config('shakespeare_gshard')
  config = merge(config, {'model': {'moe': {'num_experts': 0}}})
  twin = run_config.read(config)
  model = twin.model
  moe = model.moe.within(model.ffn, model.dropout)
  assert moe.twin().ffn.hidden == 2 * 256
  dense = options_of('shakespeare_dense')
  counts = [
    sum(
      math.prod(leaf.shape)
      for leaf in jax.tree.leaves(
        nn.meta.unbox(models.abstract_params(options.filled(65).build()))
      )
    )
    for options in (twin, dense)
  ]
  assert counts[0] == counts[1]
