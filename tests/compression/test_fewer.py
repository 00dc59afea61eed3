"""Merging and pruning: outputs that stay, and the sizes of changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import merge
from moe_jax.compression.fewer import (
  Calibrated,
  check_layer,
  in_groups,
  numbers,
  numbers_by_share,
  only,
  prune,
  without,
)
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import TokenChoice
from moe_jax.models.expert_arrays import assembled, sparse_layers, with_copies
from moe_jax.models.trees import init_router_state
from tests.compression import sparse_runs
from tests.compression.sparse_runs import outputs, run_of, smaller_run
from tests.compression.test_merge import shuffled


@functools.cache
def calibrate(**moe):
  return sparse_runs.calibrated(run_of(**moe))


def with_layers(run, change):
  """The run whose sparse layers' arrays are changed by change(layer)."""
  changes = {
    n: jax.tree.map(jnp.asarray, change(layer))
    for n, layer in sparse_layers(run.model, run.variables).items()
  }
  variables = assembled(run.model, run.variables, run.model, changes)
  return run._replace(variables=variables)


@pytest.mark.slow
def test_merging_equal_experts_changes_nothing():
  def doubled(layer):
    # Experts 3 and 4 are 0 and 2 with their hidden units in another order.
    index = np.array([0, 1, 2, 0, 2])
    experts = {p: np.asarray(x)[index] for p, x in layer.experts.items()}
    return shuffled(layer._replace(experts=experts), layer.number)

  run = with_layers(run_of(), doubled)
  calibrated = sparse_runs.calibrated(run)
  for group_by in ('outputs', 'weights'):
    smaller_layers = merge.merge(calibrated, {1: 3, 2: 4}, group_by=group_by)
    assert smaller_layers[1].row == (0, 1, 2, 0, 2)
  merged_run = smaller_run(run, smaller_layers)
  rows = merged_run.options.model.moe.retained.rows
  assert rows == {n: smaller_layers[n].row for n in (1, 2)}
  for n in (1, 2):
    y, load = outputs(run, n)
    merged_y, merged_load = outputs(merged_run, n)
    np.testing.assert_allclose(merged_y, y, atol=1e-5)
    np.testing.assert_array_equal(merged_load, load)


def test_layers_keep_the_experts_of_the_largest_scores():
  calibrated = calibrate()
  scores = {
    n: usage.gated_norm / np.maximum(usage.choices, 1)
    for n, usage in calibrated.usage.items()
  }
  smaller_layers = prune(calibrated, {1: 2, 2: 4})
  for n, count in {1: 2, 2: 4}.items():
    best = sorted(np.argsort(-scores[n])[:count].tolist())
    assert smaller_layers[n].groups == tuple((e,) for e in best)
  pruned = smaller_run(calibrated.run, smaller_layers)
  moe = pruned.options.model.moe
  assert (moe.num_experts, moe.retained) == (4, Retained('1:2'))
  assert [m and m.num_experts for m in pruned.model.stacks.moes] == [None, 2, 4]
  even = prune(calibrated, {1: 3, 2: 3})
  moe = smaller_run(calibrated.run, even).options.model.moe
  assert (moe.num_experts, moe.retained) == (3, Retained())


def test_a_score_or_a_rule_that_there_is_not_is_named():
  none = Calibrated(None, {}, {})
  with pytest.raises(ValueError, match=r"unknown score 'raep'; did you mean"):
    prune(none, {}, score='raep')
  with pytest.raises(
    ValueError, match=r"rule 'zz'; have \['clusters', 'cores'"
  ):
    merge.merge(none, {}, rule='zz')


def test_numbers_are_one_for_all_or_one_for_each_layer():
  layers = calibrate().layers
  assert numbers('3', layers) == {1: 3, 2: 3}
  assert numbers('4, 2', layers) == {1: 4, 2: 2}
  for text, problem in {
    '4,4,4': r'has 3 numbers, .* sparse layers \[1, 2\]',
    '1': r'1 in layer 1 is not in \[num_selected=2, num_experts=5\]',
  }.items():
    with pytest.raises(ValueError, match=problem):
      numbers(text, layers)


def test_a_share_is_one_threshold_for_all_layers():
  layers = calibrate().layers
  scores = {1: np.array([8, 4, 2, 1, 0.0]), 2: np.array([1, 1, 0.9, 0.8, 0.0])}
  # In proportion to the largest: 1, .5, .25, .125, 0 and 1, 1, .9, .8, 0.
  assert numbers_by_share(0.6, scores, layers) == {1: 2, 2: 4}
  assert numbers_by_share(0.7, scores, layers) == {1: 3, 2: 4}
  # K of each layer stay whatever their score.
  assert numbers_by_share(0.1, scores, layers) == {1: 2, 2: 2}
  assert numbers_by_share(1, scores, layers) == {1: 5, 2: 5}


@functools.cache
def biased():
  """A run with a balancing bias, which keeps all tokens from expert 1."""
  run = run_of(
    router=TokenChoice(gates='sigmoid', use_bias=True, balance_bias_rate=0.1)
  )
  rng = np.random.default_rng(3)
  state = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype).at[:, 1].set(-9),
    init_router_state(run.model),
  )
  return run._replace(variables={**run.variables, 'router_state': state})


def bias_of(run, layer):
  state = run.model.stacks.layer_trees(run.variables['router_state'])[layer]
  return np.asarray(state['moe']['router']['balance_bias'])


def test_the_bias_of_experts_that_stay_stays():
  run, remaining = biased(), [0, 2, 3, 4]
  layers = sparse_layers(run.model, run.variables)
  pruned = smaller_run(run, {1: only(layers[1], remaining)})
  np.testing.assert_array_equal(bias_of(pruned, 1), bias_of(run, 1)[remaining])
  np.testing.assert_array_equal(bias_of(pruned, 2), bias_of(run, 2))
  y, load = outputs(run, 1)
  assert load[1] == 0
  np.testing.assert_allclose(outputs(pruned, 1)[0], y, rtol=1e-5, atol=1e-5)


def test_columns_of_merged_experts_keep_their_biases():
  run = biased()
  merged = smaller_run(run, merge.merge(calibrate(), {1: 3, 2: 4}))
  np.testing.assert_array_equal(bias_of(merged, 1), bias_of(run, 1))
  # As do the columns of the copies that are exported.
  options, copied = with_copies(merged.options.model, merged.variables)
  assert options == run.options.model
  state = run.variables['router_state']
  jax.tree.map(np.testing.assert_array_equal, copied['router_state'], state)


def test_merged_experts_are_not_merged_again():
  merged = smaller_run(calibrate().run, merge.merge(calibrate(), {1: 3, 2: 3}))
  layers = sparse_layers(merged.model, merged.variables)
  with pytest.raises(ValueError, match='layer 2 has merged experts already'):
    check_layer(layers[2])


def test_an_unknown_score_or_rule_is_named_with_those_that_exist():
  with pytest.raises(ValueError, match=r"unknown score 'reep'.*'reap'"):
    prune(calibrate(), {1: 3, 2: 3}, score='reep')
  with pytest.raises(ValueError, match=r"unknown rule 'core'.*'cores'"):
    merge.merge(calibrate(), {1: 3, 2: 3}, rule='core')


def test_each_group_of_experts_keeps_as_many():
  router = TokenChoice(expert_groups=2, chosen_expert_groups=1)
  run = run_of(num_experts=6, router=router)
  calibrated = sparse_runs.calibrated(run)
  scores = np.array([9.0, 8, 7, 1, 3, 2])
  usage = {n: u._replace(choices=scores) for n, u in calibrated.usage.items()}
  calibrated = calibrated._replace(usage=usage)
  layers = prune(calibrated, {1: 4, 2: 4}, score='usage')
  assert layers[1].row == (0, 1, 2, 3)
  assert layers[1].groups == ((0,), (1,), (4,), (5,))
  assert smaller_run(run, layers).options.model.moe.num_experts == 4
  assert in_groups(calibrated.layers, {1: 3, 2: 2}) == {1: 4, 2: 2}
  with pytest.raises(ValueError, match=r'layer 1: .* would keep \[3, 2\]'):
    without(run, {1: [3]})


def test_tokens_of_a_lost_expert_take_their_next_choice():
  run = run_of()
  _, load = outputs(run, 1)
  new = without(run, {1: [3]})
  assert new.options.model.moe.retained == Retained('1:4')
  _, new_load = outputs(new, 1)
  assert load[3] > 0
  assert new_load.sum() == load.sum()
  assert (new_load >= load[[0, 1, 2, 4]]).all()
  # Another layer loses an expert after the first.
  again = without(new, {2: [0, 1]}).options.model.moe
  assert (again.num_experts, again.retained) == (4, Retained('2:3'))
