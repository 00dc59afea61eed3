"""Expressions choose what trains, and a step leaves all else as it was."""

import functools
import math

import jax
import numpy as np
import pytest

from moe_jax import models, partitioning
from moe_jax.training import trainable
from moe_jax.training.programs import make_programs
from moe_jax.training.trainable import Trained
from tests.training import tiny

V = 264
BIASED = dict(gates='sigmoid', balance_bias_rate=0.1)
EVERY_SECOND = dict(
  num_experts=4, num_selected=2, router=dict(token_choice=BIASED)
)
PARTS = {
  'experts + router': {'expert', 'router'},
  'non_experts - embeddings': {'attention', 'ffn', 'norm', 'router'},
  '-experts - attention': {'embedding', 'ffn', 'norm', 'router'},
}


@functools.cache
def programs(expression):
  options = tiny.options(
    batch_size=8,
    trainable=expression,
    model=dict(vocab_size=V, moe=EVERY_SECOND),
    optimizer=dict(clip_norm=1e3, weight_decay=0.1),
  )
  mesh = options.mesh.make(jax.devices()[:1])
  return options, make_programs(options, options.build(), mesh)


@functools.cache
def roles():
  options, _ = programs('all')
  return models.describe(options.build()).roles


def select(expression):
  return trainable.trained_by(programs('all')[1].adapters, expression)


def batch_of(options):
  rows = tiny.batch(options, vocab_size=V)
  return jax.tree.map(np.asarray, rows)


def names_of(tree):
  """The values of the leaves by name; frozen leaves of None are left out."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {partitioning.path_name(path): np.asarray(x) for path, x in leaves}


def role_names(chosen):
  leaves = jax.tree_util.tree_leaves_with_path(
    roles(), is_leaf=lambda leaf: hasattr(leaf, 'role')
  )
  return {
    partitioning.path_name(path) for path, role in leaves if role.role in chosen
  }


@pytest.mark.parametrize('expression', PARTS)
def test_an_expression_selects_by_role(expression):
  trained = select(expression)
  assert trained.names == role_names(PARTS[expression])


def test_a_pattern_selects_by_name():
  trained = select('re:experts/w_in + router')
  assert {name.rpartition('/')[2] for name in trained.names} == {'w_in', 'w'}


@pytest.mark.parametrize(
  ('expression', 'message'),
  [
    ('lstm', "no parameter of 'lstm'; have .*'attention'"),
    ('experts router', 'is no sum of parts'),
    ('experts - experts', 'selects no parameter'),
  ],
)
def test_what_the_model_lacks_is_refused_by_name(expression, message):
  with pytest.raises(ValueError, match=message):
    select(expression)


def test_what_does_not_train_keeps_its_bits_and_has_no_state():
  options, run_programs = programs('experts')
  state = tiny.first_state(run_programs)
  before = names_of(state.params)
  batch = run_programs.put(batch_of(options))
  for _ in range(2):
    state, _ = run_programs.train_step(state, batch)
  trained = role_names({'expert'})
  for name, value in names_of(state.params).items():
    assert (value == before[name]).all() == (name not in trained), name
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  all_moments = jax.tree.leaves(programs('all')[1].abstract_state.opt_state)
  assert 0 < sum(x.size for x in moments) < sum(x.size for x in all_moments)
  size = sum(before[name].size for name in trained)
  assert sum(leaf.size for leaf in moments) == 2 * size
  # The balancing bias is the router's, which does not train.
  (bias,) = jax.tree.leaves(state.router_state)
  assert bias.size == 4 and not np.asarray(bias).any()


def test_the_state_of_a_router_moves_where_its_parameters_train():
  def is_moved(trained, module='layers/layer_1/moe/router'):
    state = functools.reduce(
      lambda tree, key: {key: tree}, reversed(module.split('/')), {'bias': 0}
    )
    moved = trained.moved(state, jax.tree.map(lambda x: x + 1, state))
    return jax.tree.leaves(moved) == [1]

  for expression in ('all', 'router', 'non_experts', 're:router/w'):
    assert is_moved(select(expression))
  for expression in ('experts', 'attention', 'all - router'):
    assert not is_moved(select(expression))
  for part, moves in (('router/w', True), ('experts/w_in', False)):
    name = f'lora/layers/layer_1/moe/{part}/a'
    assert is_moved(Trained('lora', frozenset([name]))) == moves
  # A router without parameters is one of those that train with all alone.
  assert is_moved(select('all'), 'layers/none')
  assert not is_moved(select('non_experts'), 'layers/none')


@pytest.mark.slow
def test_the_gradient_is_that_of_all_parameters_and_its_pass_is_pruned():
  norms, flops = {}, {}
  rest = '-experts - router'
  for expression in ('all', 'experts + router', rest):
    options, run_programs = programs(expression)
    batch = run_programs.put(batch_of(options))
    metrics = run_programs.train_step(tiny.first_state(run_programs), batch)[1]
    norms[expression] = float(metrics.grad_norm)
    lowered = run_programs.train_step.lower(run_programs.abstract_state, batch)
    flops[expression] = lowered.cost_analysis()['flops']
  joint_norm = math.hypot(norms['experts + router'], norms[rest])
  np.testing.assert_allclose(joint_norm, norms['all'], rtol=1e-5)
  # The router's and the experts' gradients need those of later layers' inputs,
  # but of no other weights.
  assert flops['experts + router'] < 0.9 * flops['all']
