"""Every config: its dump, its size, and two steps of it shrunk."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import base
from moe_jax import evaluation, models
from moe_jax.config import merge
from moe_jax.training import setup, step
from moe_jax.training.abstract import abstract_batch
from moe_jax.training.evaluate import changed_models, check_entries
from tests import golden
from tests.training import tiny


def filled(config, vocab_size):
  """The config with a vocabulary, and the shape of examples, if of any."""
  of_features = config.model.kind in models.OF_FEATURES
  return setup.with_vocabulary(config, vocab_size, (7,) if of_features else ())


def batch_of(config):
  """Random rows of the config's lengths, for both halves if there are two."""
  if config.model.kind in models.OF_FEATURES:
    ones = {
      k: np.ones(v.shape, v.dtype) for k, v in abstract_batch(config).items()
    }
    rng = np.random.default_rng(0)
    features = rng.normal(size=ones['features'].shape).astype(np.float32)
    return ones | {'features': features}
  batch = tiny.batch(config)
  if config.model.kind != 'encoder_decoder':
    return batch
  decoder = merge(config, {'data': {'seq_len': config.data.target_len}})
  encoder = {
    f'encoder_{name}': batch[name]
    for name in ('tokens', 'segment_ids', 'positions')
  }
  return tiny.batch(decoder, seed=1) | encoder


@pytest.mark.parametrize('name', golden.NAMES)
def test_dump(name):
  expected = (golden.FOLDER / f'{name}.json').read_text()
  assert golden.dump(name) == expected, (
    'the config changed; if that is meant: python -m tests.golden'
  )


# Shrunk they differ from `mixtral_8x7b` and `tiny_seq2seq` in what
# `tests/models` holds to account; most of their time is compiling.
SIBLINGS = (
  'glam_64b64e',
  'nllb_moe_54b',
  'openmoe_8b',
  'shazeer_multilingual',
  'st_moe_32b',
  'st_moe_base',
  'switch_base',
  'switch_c',
  't5_base',
)
each_config = pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name in SIBLINGS else ())
    for name in golden.NAMES
  ],
)


@each_config
def test_initialises_as_shapes_at_full_size(name):
  config = filled(golden.config(name), 65)
  model = models.build(config)
  shapes = nn.meta.unbox(
    models.abstract_params(model, min(config.data.seq_len, 64))
  )
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert total > (100 if config.model.kind in models.OF_FEATURES else 500_000)
  check_entries(config, evaluation.KINDS)
  assert set(changed_models(config, model)) == set(config.evals)


@each_config
def test_two_steps_shrunk(name):
  config = filled(golden.config(name, 'runlocal'), 257)
  model = models.build(config)
  batch = batch_of(config)
  axes = setup.axis_names(models.abstract_params(model, config.data.seq_len))
  optimizer = setup.make_optimizer(config.optimizer, config.total_steps, axes)
  init = functools.partial(
    step.init_state,
    model=model,
    optimizer=optimizer,
    seq_len=config.data.seq_len,
  )
  state = jax.jit(init)(jnp.asarray(config.seed, jnp.uint32))
  run = jax.jit(
    functools.partial(
      step.train_step,
      grad_fn=step.make_grad_fn(
        model, setup.loss_weights(config, model), config.microbatches
      ),
      optimizer=optimizer,
      schedule=optax.constant_schedule(0.0),
    )
  )
  losses = []
  for _ in range(2):
    state, metrics = run(state, batch)
    losses.append(float(metrics.loss))
  assert int(state.step) == 2
  assert np.isfinite(losses).all()
  assert losses[0] != losses[1]


def test_shrinking_keeps_what_is_sparse():
  small = golden.config('openmoe_8b', 'runlocal')
  assert models.sparse_pattern(small.model.moe.layers, small.model.num_layers)[
    -1
  ]
  assert small.model.moe.num_experts == 4
  with pytest.raises(ValueError, match="unknown config argument 'laptop'"):
    golden.config('tiny_switch', 'laptop')


def test_arguments_name_published_sizes():
  assert golden.config('switch_base').model.moe.num_experts == 128
  assert golden.config('switch_base', 'e8').model.moe.num_experts == 8
  assert golden.config('switch_base', 'e256').model.moe.num_experts == 256
  large = golden.config('st_moe_base', 'large').model
  assert (large.num_layers, large.moe.num_experts) == (24, 32)
  for name, known in (('switch_base', 'e64'), ('st_moe_base', 'large')):
    with pytest.raises(ValueError, match=f"'e7'; have .*'{known}'"):
      golden.config(name, 'e7')


def test_only_glam_leaks_the_future():
  leaking = [
    name
    for name in golden.NAMES
    if models.leaks_future(golden.config(name).model.moe)
  ]
  assert leaking == ['glam_64b64e']


def test_a_config_comes_back_locked():
  config = golden.config('tiny_switch')
  with pytest.raises(AttributeError):
    config.model.moe.num_expertz = 4
  with pytest.raises(ValueError, match=r"did you mean 'model.width'"):
    merge(config, {'model': {'widht': 4}})


def test_the_dense_twin_is_one_override():
  config = setup.with_vocabulary(golden.config('shakespeare_gshard'), 65)
  twin = merge(config, {'model': {'moe': {'num_experts': 0}}})
  assert models.build(twin).config.stack.block.twin.hidden == 2 * 256
  dense = setup.with_vocabulary(golden.config('shakespeare_dense'), 65)
  shapes = [
    nn.meta.unbox(models.abstract_params(models.build(c), 64))
    for c in (twin, dense)
  ]
  count = [
    sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    for tree in shapes
  ]
  assert count[0] == count[1]


def test_base_has_every_default():
  # What a user may set is in base.py, with a comment or a name that says it.
  model = base.get_config().model
  assert set(model.moe) >= {'capacity_rule', 'slot_priority', 'gates'}
  assert model.is_locked
