"""Schedules by formula, rules by name, and Adafactor matrix by matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from moe_jax.config import merge
from moe_jax.training import optimizer

AXES = {
  'w': ('embed', 'mlp'),
  'layers': {'experts': ('layers', 'expert', 'embed', 'mlp')},
  'scale': ('embed',),
}


def config(**overrides):
  return merge(base.get_config().optimizer, overrides)


@pytest.fixture(scope='module')
def params():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    'w': jax.random.normal(keys[0], (6, 5)),
    'layers': {'experts': jax.random.normal(keys[1], (2, 3, 7, 4))},
    'scale': jnp.ones(6),
  }


@pytest.fixture(scope='module')
def grads():
  # Of very different size by expert, so that sharing a statistic would show.
  keys = jax.random.split(jax.random.key(1), 3)
  size = 10.0 ** jnp.arange(3).reshape(1, 3, 1, 1)
  return {
    'w': jax.random.normal(keys[0], (6, 5)),
    'layers': {
      'experts': size * jax.random.normal(keys[1], (2, 3, 7, 4)),
    },
    'scale': jax.random.normal(keys[2], (6,)),
  }


def run(transform, params, grads, steps=3):
  state = transform.init(params)
  for _ in range(steps):
    updates, state = transform.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize(
  ('schedule', 'step', 'expected'),
  [
    ('cosine', 0, 0.1),  # the first of ten warm-up steps
    ('cosine', 9, 1.0),
    ('cosine', 55, 0.1 + 0.9 * 0.5),  # half way down to final_fraction
    ('cosine', 100, 0.1),
    ('constant', 99, 1.0),
    ('inverse_sqrt', 9, 1.0),
    ('inverse_sqrt', 40, 0.5),  # sqrt(10 / 40)
  ],
)
def test_schedule_by_formula(schedule, step, expected):
  c = config(schedule=schedule, learning_rate=1.0, warmup_steps=10)
  rate = optimizer.make_schedule(c, 100)(step)
  np.testing.assert_allclose(rate, expected, rtol=1e-6)


def test_adamw_is_optax_adamw(params, grads):
  c = config(
    schedule='constant',
    warmup_steps=0,
    clip_norm=0.0,
    weight_decay_rules=(('', 1.0),),
  )
  theirs = optax.adamw(
    c.learning_rate, c.b1, c.b2, c.epsilon, weight_decay=c.weight_decay
  )
  ours = optimizer.make_optimizer(c, 10, AXES)
  for a, b in zip(
    jax.tree.leaves(run(ours, params, grads)),
    jax.tree.leaves(run(theirs, params, grads)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_rules_by_name(params):
  c = config(
    schedule='constant',
    warmup_steps=0,
    learning_rate=1.0,
    weight_decay=0.5,
    learning_rate_rules=(('experts', 0.1), ('', 1.0)),
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  moved = run(optimizer.make_optimizer(c, 10, AXES), params, zeros, steps=1)
  # Without a gradient only decay moves: half, a tenth of half, not at all.
  np.testing.assert_allclose(moved['w'], 0.5 * params['w'], rtol=1e-6)
  np.testing.assert_allclose(
    moved['layers']['experts'], 0.95 * params['layers']['experts'], rtol=1e-6
  )
  np.testing.assert_array_equal(moved['scale'], params['scale'])


def test_a_parameter_without_a_rule_is_an_error(params):
  c = config(weight_decay_rules=(('experts', 1.0),))
  transform = optimizer.make_optimizer(c, 1000, AXES)
  with pytest.raises(ValueError, match=r"weight_decay_rules.*'scale'|'w'"):
    run(transform, params, params, steps=1)


def test_clipping_is_by_the_global_norm(params, grads):
  c = config(name='adamw', clip_norm=0.5, warmup_steps=0, schedule='constant')
  scale = 0.5 / float(optax.global_norm(grads))
  clipped = jax.tree.map(lambda g: g * scale, grads)
  free = optimizer.make_optimizer(merge(c, {'clip_norm': 0.0}), 10, AXES)
  a = run(optimizer.make_optimizer(c, 10, AXES), params, grads)
  b = run(free, params, clipped)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)


ADAFACTOR = dict(
  name='adafactor',
  b1=0.0,
  clip_norm=0.0,
  weight_decay=0.0,
  schedule='constant',
  warmup_steps=0,
  adafactor_min_dim_size=2,
)


def test_adafactor_is_optax_adafactor_on_each_matrix(params, grads):
  c = config(**ADAFACTOR)
  moved = run(optimizer.make_optimizer(c, 10, AXES), params, grads)
  theirs = optax.adafactor(
    c.learning_rate,
    min_dim_size_to_factor=2,
    decay_rate=0.8,
    multiply_by_parameter_scale=True,
    weight_decay_rate=None,
  )
  for layer, expert in np.ndindex(2, 3):
    alone = run(
      theirs,
      params['layers']['experts'][layer, expert],
      grads['layers']['experts'][layer, expert],
    )
    np.testing.assert_allclose(
      moved['layers']['experts'][layer, expert], alone, rtol=1e-4, atol=1e-6
    )
  # On the stack as a whole, optax gives another update: the reason for it.
  whole = run(theirs, params, grads)
  difference = whole['layers']['experts'] - moved['layers']['experts']
  assert np.abs(difference).max() > 1e-4


def test_adafactor_never_factors_over_experts(params):
  transform = optimizer.make_optimizer(config(**ADAFACTOR), 10, AXES)
  shapes = {
    leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      transform.init(params)
    )
    if 'experts' in jax.tree_util.keystr(path) and leaf.size > 6
  }
  # Row and column statistics, each with its own [L, E] in front.
  assert shapes == {(2, 3, 7), (2, 3, 4)}


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'name': 'sgd'}, r"optimizer.name 'sgd'.*adafactor"),
    ({'schedule': 'linear'}, r"schedule 'linear'.*cosine"),
    ({'warmup_steps': 11}, r'warmup_steps=11 not in \[0, total_steps=10\]'),
    ({'clip_norm': -1.0}, r'clip_norm=-1.0'),
  ],
)
def test_bad_values(overrides, message):
  with pytest.raises(ValueError, match=message):
    optimizer.make_optimizer(merge(config(warmup_steps=0), overrides), 10, AXES)
