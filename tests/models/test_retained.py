"""Models whose layers have lost experts: uneven ones, and merged ones."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.analysis import counts
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import TokenChoice
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.models.trees import (
  flatten,
  init_router_state,
  move_router_state,
  unflatten,
)
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
