"""Merging and pruning: outputs that stay, and the sizes of changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import merge, prune
from moe_jax.compression.fewer import (
  check_columns,
  check_layer,
  numbers,
  only,
  without,
)
from moe_jax.compression.fewer_command import numbers_by_share, report_lines
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import Hash, TokenChoice
from moe_jax.models.expert_arrays import (
  assembled,
  assembled_state,
  sparse_layers,
)
from moe_jax.models.router_state import init_router_state
from tests.compression import sparse_runs
from tests.compression.sparse_runs import E, outputs, run_of, smaller_run
from tests.compression.test_align import shuffled
from tests.models import tiny


@functools.cache
def calibrate(**moe):
  return sparse_runs.calibrated(run_of(**moe))


def with_layers(run, change):
  """The run whose sparse layers' arrays are changed by change(layer)."""
  params = run.variables['params']
  changes = {
    n: jax.tree.map(jnp.asarray, change(layer))
    for n, layer in sparse_layers(run.model, params).items()
  }
  params = assembled(run.model, params, run.model, changes)
  return run._replace(variables={'params': params})


def unloved(layer, expert=1):
  """A router whose biases keep tokens from one expert, yet not far."""
  path = ('moe', 'router', 'b')
  return {path: layer.columns[path].at[expert].add(-6.0)}


@pytest.mark.parametrize('router', ['tied', 'shrunk'])
def test_as_many_experts_as_before_are_the_same_bits(router):
  calibrated = calibrate()
  counts = {1: E, 2: E}
  for smaller_layers in (
    merge.merge(calibrated, counts),
    prune.prune(calibrated, counts),
  ):
    same_run = smaller_run(calibrated.run, smaller_layers, router)
    assert same_run.options.model == calibrated.run.options.model
    old = tiny.leaves(calibrated.run.variables['params'])
    new = tiny.leaves(same_run.variables['params'])
    assert old.keys() == new.keys()
    for name in old:
      np.testing.assert_array_equal(old[name], new[name])


@pytest.mark.slow
def test_merging_equal_experts_under_tied_columns_changes_nothing():
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
  merged_run = smaller_run(run, smaller_layers, 'tied')
  assert merged_run.options.model.moe.retained.rows == {
    1: smaller_layers[1].row,
    2: smaller_layers[2].row,
  }
  for n in (1, 2):
    y, load = outputs(run, n)
    merged_y, merged_load = outputs(merged_run, n)
    np.testing.assert_allclose(merged_y, y, atol=1e-5)
    np.testing.assert_array_equal(merged_load, load)
  # A shrunk router has lost columns, so that tokens choose otherwise.
  shrunk, _ = outputs(smaller_run(run, smaller_layers, 'shrunk'), 1)
  assert np.abs(shrunk - y).max() > 1e-2


def test_a_merged_expert_is_the_mean_by_usage_of_aligned_ones():
  calibrated = calibrate()
  layer, usage = calibrated.layers[1], calibrated.usage[1]
  usage = usage._replace(choices=np.array([6.0, 0, 2, 0, 0]))
  smaller_layer = merge.merged(layer, usage, ((0, 2), (1, 3), (4,)))
  assert smaller_layer.row == (0, 1, 0, 1, 2)
  w = ('moe', 'router', 'w')
  old, new = np.asarray(layer.columns[w]), np.asarray(smaller_layer.columns[w])
  np.testing.assert_allclose(
    new[:, 0], 0.75 * old[:, 0] + 0.25 * old[:, 2], rtol=1e-6
  )
  # Nobody used 1 and 3: their mean is even.
  np.testing.assert_allclose(new[:, 1], (old[:, 1] + old[:, 3]) / 2, rtol=1e-6)
  np.testing.assert_array_equal(new[:, 2], old[:, 4])
  b = ('moe', 'experts', 'b_out')  # it has no hidden units to align
  old, new = np.asarray(layer.experts[b]), np.asarray(smaller_layer.experts[b])
  np.testing.assert_allclose(new[0], 0.75 * old[0] + 0.25 * old[2], rtol=1e-6)
  np.testing.assert_array_equal(new[2], old[4])
  # An expert that no token reached has no weight beside one that is used.
  smaller_layer = merge.merged(layer, usage, ((0, 1), (2,), (3,), (4,)))
  for path, x in smaller_layer.experts.items():
    np.testing.assert_array_equal(x[0], layer.experts[path][0])


@pytest.mark.slow
def test_pruning_what_nobody_chooses_lets_raw_gates_grow():
  run = with_layers(run_of(), unloved)
  y, load = outputs(run, 1)
  assert load[1] == 0
  remaining = [0, 2, 3, 4]
  layers = sparse_layers(run.model, run.variables['params'])
  smaller_layers = {n: only(layer, remaining) for n, layer in layers.items()}
  pruned, _ = outputs(smaller_run(run, smaller_layers, 'shrunk'), 1)
  # The formula: outputs grow by 1 / (1 - p).
  x = sparse_runs.X
  p = np.asarray(prune.probabilities(layers[1], jnp.asarray(x)))
  params = run.model.layer_trees(run.variables['params'])[1]['moe']['router']
  logits = x @ np.asarray(params['w']) + np.asarray(params['b'])
  odds = np.exp(logits)
  np.testing.assert_allclose(
    p, odds / odds.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6
  )
  assert p[..., 1].max() > 1e-3
  np.testing.assert_allclose(
    pruned, y / (1 - p[..., 1:2]), rtol=1e-4, atol=1e-5
  )


def test_the_growth_of_raw_gates_is_measured_on_calibration_data():
  run = with_layers(run_of(), unloved)
  calibrated = sparse_runs.calibrated(run)
  smaller_layers = prune.prune(calibrated, {1: 4, 2: 5}, score='usage')
  assert smaller_layers[1].row == (0, -1, 1, 2, 3)
  growth_by_layer = prune.growth(calibrated, smaller_layers)
  assert list(growth_by_layer) == [1]  # layer 2 keeps all of its experts
  assert (
    growth_by_layer[1].token_share == 1
    and 1e-4 < growth_by_layer[1].growth < 0.5
  )
  renormalized = with_layers(run_of(gates='renormalized'), unloved)
  assert (
    prune.growth(
      calibrated._replace(
        run=renormalized,
        layers=sparse_layers(
          renormalized.model, renormalized.variables['params']
        ),
      ),
      smaller_layers,
    )
    == {}
  )


def test_a_factor_of_gates_is_no_part_of_the_probabilities():
  scaled = run_of(router=TokenChoice(gates='raw', gate_scale=2.5))
  layers = sparse_layers(scaled.model, scaled.variables['params'])
  p = prune.probabilities(layers[1], jnp.asarray(sparse_runs.X))
  np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-5)


def test_experts_that_change_their_group_are_told():
  router = TokenChoice(expert_groups=2, chosen_expert_groups=1)
  run = run_of(num_experts=6, router=router)
  layers = sparse_layers(run.model, run.variables['params'])
  calibrated = sparse_runs.calibrated(run)

  def warnings(remaining, router='shrunk'):
    smaller_layers = {1: only(layers[1], remaining)}
    lines = report_lines(calibrated, {}, smaller_layers, router)
    return [line for line in lines if 'WARNING' in line]

  (warning,) = warnings([0, 1, 2, 5])
  assert 'layer 1:' in warning
  assert 'experts [2] are in another group' in warning
  assert not warnings([0, 2, 3, 4])
  assert not warnings([0, 1, 2, 5], 'masked')


def test_layers_keep_the_experts_of_the_largest_scores():
  calibrated = calibrate()
  scores = {
    n: usage.gated_norm / np.maximum(usage.choices, 1)
    for n, usage in calibrated.usage.items()
  }
  smaller_layers = prune.prune(calibrated, {1: 2, 2: 4})
  for n, count in {1: 2, 2: 4}.items():
    remaining = [e for e, to in enumerate(smaller_layers[n].row) if to >= 0]
    assert set(remaining) == set(np.argsort(-scores[n])[:count])
  pruned = smaller_run(calibrated.run, smaller_layers, 'shrunk')
  moe = pruned.options.model.moe
  assert (moe.num_experts, moe.retained) == (4, Retained('1:2'))
  assert [m and m.num_experts for m in pruned.model.moes] == [None, 2, 4]
  even = prune.prune(calibrated, {1: 3, 2: 3})
  moe = smaller_run(calibrated.run, even, 'shrunk').options.model.moe
  assert (moe.num_experts, moe.retained) == (3, Retained())


def test_routers_keep_columns_where_all_of_their_stack_have_as_many():
  # Layer 1 has lost two of five experts and their columns.
  run = run_of(retained=Retained('1:3'))
  layers = sparse_layers(run.model, run.variables['params'])
  smaller_layers = {
    1: only(layers[1], [0, 1, 2]),
    2: only(layers[2], [0, 1, 2, 4]),
  }
  check_columns(run, {1: 3, 2: 4})
  moe = smaller_run(run, smaller_layers, 'masked').options.model.moe
  assert moe.retained == Retained('1:3', '2: 0 1 2 - 3')
  for counts in ({1: 2, 2: 4}, {}):
    with pytest.raises(ValueError, match='layer 1 has 3 columns and other lay'):
      check_columns(run, counts)


def test_numbers_are_one_for_all_or_one_for_each_layer():
  layers = calibrate().layers
  assert numbers('3', layers) == {1: 3, 2: 3}
  assert numbers('4, 2', layers) == {1: 4, 2: 2}
  for text, problem in {
    'x': "neither a number nor '4,6,4'",
    '4,4,4': r'has 3 numbers, .* sparse layers \[1, 2\]',
    '1': r'1 in layer 1 is not in \[num_selected=2, num_experts=5\]',
    '4,6': '6 in layer 2 is not in',
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
  with pytest.raises(ValueError, match='share=0 not in'):
    numbers_by_share(0, scores, layers)


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
  state = run.model.layer_trees(run.variables['router_state'])[layer]
  return np.asarray(state['moe']['router']['balance_bias'])


@pytest.mark.parametrize('router', ['masked', 'shrunk'])
def test_the_bias_of_experts_that_stay_stays(router):
  run, remaining = biased(), [0, 2, 3, 4]
  layers = sparse_layers(run.model, run.variables['params'])
  smaller_layers = {
    1: only(layers[1], remaining),
    2: only(layers[2], [*range(E)]),
  }
  pruned = smaller_run(run, smaller_layers, router)
  columns = remaining if router == 'shrunk' else slice(None)
  np.testing.assert_array_equal(bias_of(pruned, 1), bias_of(run, 1)[columns])
  np.testing.assert_array_equal(bias_of(pruned, 2), bias_of(run, 2))
  if router == 'shrunk':
    y, load = outputs(run, 1)
    assert load[1] == 0
    np.testing.assert_allclose(outputs(pruned, 1)[0], y, rtol=1e-5, atol=1e-5)


def test_the_bias_of_merged_experts_is_their_mean_by_usage():
  run = biased()
  layers = sparse_layers(run.model, run.variables['params'])
  usage = calibrate().usage[1]._replace(choices=np.array([6.0, 0, 2, 0, 0]))
  smaller_layers = {
    1: merge.merged(layers[1], usage, ((0, 2), (1, 3), (4,))),
    2: only(layers[2], [*range(E)]),
  }
  old, new = (
    bias_of(run, 1),
    bias_of(smaller_run(run, smaller_layers, 'shrunk'), 1),
  )
  expected = [0.75 * old[0] + 0.25 * old[2], (old[1] + old[3]) / 2, old[4]]
  np.testing.assert_allclose(new, expected, rtol=1e-6)
  # Tied columns keep their biases, as do the copies that are exported.
  tied = smaller_run(run, smaller_layers, 'tied')
  np.testing.assert_array_equal(bias_of(tied, 1), old)
  state = run.variables['router_state']
  copied = assembled_state(
    tied.model, tied.variables['router_state'], run.model
  )
  jax.tree.map(np.testing.assert_array_equal, copied, state)


def test_masked_columns_do_not_count_where_a_bias_moves():
  run = biased()
  layers = sparse_layers(run.model, run.variables['params'])
  new = smaller_run(run, {1: only(layers[1], [0, 2, 3, 4])}, 'masked')
  # The experts that are left have 5 choices in the mean; all columns have 4.
  load = jnp.tile(jnp.array([4.0, 0, 4, 4, 8]), (3, 1))
  state = new.variables['router_state']
  moved = new._replace(
    variables={'router_state': new.model.move_router_state(state, load)}
  )
  for layer, signs in ((1, [1, 1, 1, -1]), (2, [0, 0, 0, -1])):
    change = (bias_of(moved, layer) - bias_of(new, layer))[[0, 2, 3, 4]]
    np.testing.assert_allclose(change, 0.1 * np.array(signs), atol=1e-6)


def test_routers_without_columns_or_with_tied_ones_are_refused():
  model = tiny.build({'router': Hash()})
  layer = sparse_layers(model, tiny.params_of(model))[0]
  with pytest.raises(ValueError, match='layer 0: Hash has no column for each'):
    check_layer(layer)
  tied = smaller_run(
    calibrate().run, merge.merge(calibrate(), {1: 3, 2: 3}), 'tied'
  )
  layers = sparse_layers(tied.model, tied.variables['params'])
  with pytest.raises(ValueError, match='layer 2 has tied columns already'):
    check_layer(layers[2])


def test_tokens_of_a_lost_expert_take_their_next_choice():
  run = run_of()
  _, load = outputs(run, 1)
  new = without(run, {1: [3]})
  assert new.options.model.moe.retained.rows == {1: (0, 1, 2, -1, 3)}
  _, new_load = outputs(new, 1)
  assert load[3] > 0
  assert new_load[3] == 0
  assert new_load.sum() == load.sum()
  assert (new_load >= load)[[0, 1, 2, 4]].all()


@pytest.mark.parametrize(
  ('lost', 'text'),
  [
    ({0: [1]}, r'layer 0 is not sparse; \[1, 2\] are'),
    ({1: [5, 9]}, r'layer 1 has no experts \[5, 9\], only 5'),
    ({2: range(4)}, 'layer 2 would keep 1 experts, .* num_selected=2'),
  ],
)
def test_experts_that_cannot_be_lost_are_refused(lost, text):
  with pytest.raises(ValueError, match=text):
    without(run_of(), lost)
