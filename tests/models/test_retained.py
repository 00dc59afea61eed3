"""Models whose layers have lost experts: uneven ones, and merged ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models
from moe_jax.analysis import counts
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import ExpertChoice, Hash, TokenChoice
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.models.trees import (
  flatten,
  init_router_state,
  move_router_state,
  unflatten,
)
from moe_jax.partitioning import ShardingOptions, make_mesh, tree_shardings
from moe_jax.routing.capacity import All, Fixed, PerToken
from tests.models import tiny

# Two layers of five experts, which lose two each.
ROWS = {0: (0, 1, 1, 2, 0), 1: (2, 2, 1, 0, 1)}
MERGED = Retained('', '0: 0 1 1 2 0; 1: 2 2 1 0 1')


def build(retained_experts=None, num_layers=2, **moe):
  moe = {'capacity': All(), 'retained': retained_experts or Retained(), **moe}
  return tiny.build(moe, num_layers=num_layers)


def cut(params, whole, model, experts):
  """Parameters of `model` from those of `whole`, a model of one loop.

  Args:
    params: The parameters of `whole`.
    whole: A model whose layers have equally many experts.
    model: The new model.
    experts: The old number of each new expert, by layer that has others.
  """
  params = jax.tree.map(np.asarray, params)
  layers = [flatten(t) for t in whole.stacks.layer_trees(params)]
  shapes = flatten(models.describe(model).shapes)
  new_params, old_params = {}, flatten(params)
  for path, shape in shapes.items():
    location = model.stacks.place_of(path)
    if location is None:
      new_params[path] = old_params[path]
      continue
    rows = [layers[i][location.name] for i in location.layers]
    if 'experts' in path:
      rows = [
        row[np.array(experts.get(i, range(len(row))))]
        for i, row in zip(location.layers, rows)
      ]
    new_params[path] = np.stack(rows)
    assert new_params[path].shape == shape.shape, path
  return unflatten(new_params)


def test_merged_experts_equal_copies_of_them():
  tight = dict(router=TokenChoice(), capacity=PerToken(factor=1.5))
  whole, model = build(**tight), build(MERGED, **tight)
  (stack,) = model.stacks.blocks
  (loop,) = models.pattern.segments(stack.kinds)
  assert loop.repeats == 2  # each of its layers finds a row of its own
  params = tiny.params_of(whole)
  # Old experts 0, 3 and 4 stay; the copies are those that columns lead to.
  remaining = {0: (0, 3, 4), 1: (0, 3, 4)}
  copies = {i: [remaining[i][e] for e in row] for i, row in ROWS.items()}
  batch = tiny.tokens()
  logits, aux = tiny.apply(whole)(cut(params, whole, whole, copies), batch)
  merged_logits, merged_aux = tiny.apply(model)(
    cut(params, whole, model, remaining), batch
  )
  np.testing.assert_allclose(merged_logits, logits, rtol=1e-5, atol=1e-6)
  # Columns have queues of their own, so that the same choices are dropped.
  tiny.assert_trees_close(merged_aux._asdict(), aux._asdict())
  assert aux.stats.load.shape == (2, 5) and aux.stats.overflowed.min() > 0


def test_layers_may_have_different_numbers_of_experts_and_columns():
  model = build(Retained('1:3'))
  experts = [moe.num_experts for moe in model.stacks.moes]
  assert experts == [5, 3]
  params = tiny.params_of(model)
  for tree, E in zip(model.stacks.layer_trees(params), experts, strict=True):
    assert tree['moe']['router']['w'].shape == (12, E)
    assert tree['moe']['experts']['w_in'].shape == (E, 12, 20)
  _, aux = tiny.apply(model)(params, tiny.tokens())
  load = np.asarray(aux.stats.load)  # with zeros where a layer has no expert
  assert load.shape == (2, 5)
  np.testing.assert_array_equal(load.sum(1), 2 * 30)
  assert load[0, 3:].any() and not load[1, 3:].any()


def test_parameters_and_flops_are_those_of_the_experts_that_are_left():
  whole, expert = counts.count(build(), tiny.T), 2 * 12 * 20
  merged = counts.count(build(MERGED), tiny.T)
  assert whole.expert_params - merged.expert_params == 4 * expert
  assert whole.total_params - merged.total_params == 4 * expert
  assert merged.active_params == whole.active_params
  assert merged.decoder == whole.decoder
  shrunk = counts.count(build(Retained('1:3')), tiny.T)
  assert whole.total_params - shrunk.total_params == 2 * (expert + 12)
  assert whole.decoder.router - shrunk.decoder.router == 2 * 2 * 12
  assert shrunk.decoder.experts == whole.decoder.experts


def test_an_expert_has_the_slots_of_all_its_columns():
  retained = Retained('', '0: 0 0 1 0 2')
  # A group of 8 tokens; K = 2 of 5 columns, three of them of expert 0.
  for rule, slots in (
    (All(), 16),  # a token is in no more than K of its slots
    (Fixed(slots=2), 6),
    (PerToken(factor=1.5), 9),  # 3 * ceil(1.5 * 8 / 5)
    (PerToken(factor=9.0), 16),
  ):
    moe = MoeOptions(5, 2, capacity=rule, retained=retained)
    assert moe.expert_slots(moe.sizes.slots(8), 8) == slots
  assert MoeOptions(5, 1, retained=retained).expert_slots(8, 8) == 8


def test_a_bias_moves_by_the_loads_of_its_own_columns():
  router = TokenChoice(gates='sigmoid', balance_bias_rate=0.5)
  model = build(Retained('1:3'), router=router, num_layers=2)
  state = init_router_state(model)
  load = np.array([[9, 1, 1, 1, 1], [4, 1, 1, 0, 0]], np.float32)
  new_state = move_router_state(model.stacks, state, jnp.asarray(load))
  moved = model.stacks.layer_trees(new_state)
  biases = [tree['moe']['router']['balance_bias'] for tree in moved]
  np.testing.assert_array_equal(biases[0], [-0.5, 0.5, 0.5, 0.5, 0.5])
  np.testing.assert_array_equal(biases[1], [-0.5, 0.5, 0.5])


def test_an_encoder_has_lost_experts_of_its_own():
  model = tiny.build(
    {'retained': Retained('1:3')},
    kind='encoder_decoder',
    encoder=EncoderOptions(0, {'moe': {'retained': {'experts': '0:2'}}}),
  )
  assert [moe.num_experts for moe in model.stacks.moes] == [2, 5, 5, 3]
  plain = tiny.build({'retained': Retained('1:3')}, kind='encoder_decoder')
  assert [moe.num_experts for moe in plain.stacks.moes] == [5, 5, 5, 3]


@pytest.mark.parametrize(
  ('problem', 'changes'),
  {
    "'1=4' is no entry such as '1:4'": dict(experts='1=4'),
    "experts='1:x': '1:x' is no entry such as '1:4'": dict(experts='1:x'),
    'layer 1 comes twice': dict(experts='1:4, 1:3'),
    'layer 1 has 5 experts, not in [1, num_experts=5)': dict(experts='1:5'),
    'layer 1: num_selected=2 not in [1, num_experts=1]': dict(experts='1:1'),
    'layer 1 has 4 columns, not num_experts=5': dict(expert_of='1: 0 1 0 1'),
    'layer 1 has 4 experts, and no column leads to [2]': dict(
      expert_of='1: 0 1 3 3 0'
    ),
    "'1:' is no entry such as '1: 0 1 1 2'": dict(expert_of='1: ; 2: 0 1'),
    "'1: 0 - 1 2 3' is no entry such as '1: 0 1 1 2'": dict(
      expert_of='1: 0 - 1 2 3'
    ),
    'a choice of an expert does not say by which column': dict(
      expert_of='1: 0 1 1 0 0', force_balance='random'
    ),
    'layer 1 is in experts=': dict(experts='1:2', expert_of='1: 0 1 1 0 0'),
    'names layers [7], which are not among the sparse layers [0, 1]': dict(
      experts='7:3'
    ),
    'columns of Hash cannot lead to merged': dict(
      expert_of='1: 0 1 1 0 0', router=Hash()
    ),
    'columns of ExpertChoice cannot lead to merged': dict(
      expert_of='1: 0 1 1 0 0', router=ExpertChoice(), allow_future_leak=True
    ),
  }.items(),
)
def test_bad_numbers_and_columns_are_refused_by_name(problem, changes):
  texts = {n: changes[n] for n in ('experts', 'expert_of') if n in changes}
  moe = {n: v for n, v in changes.items() if n not in texts}
  with pytest.raises(ValueError) as error:
    tiny.build({'retained': Retained(**texts), 'num_selected': 2, **moe})
  assert problem in str(error.value)


def test_a_model_of_lstms_and_experts_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='model of LSTMs have all num_experts'):
    tiny.build(
      {'retained': Retained('1:3'), 'layers': '1'},
      kind='lstm',
      positions=models.lstm_lm.NoPositions(),
    )
  trees = models.describe(build(Retained('1:3'), num_experts=4, num_layers=2))
  mesh = make_mesh({'expert': 2}, jax.devices()[:2])
  with pytest.raises(ValueError, match='expert=3 does not divide by 2 devices'):
    tree_shardings(mesh, ShardingOptions().rules, trees.axes, trees.shapes)
