"""Every exchange of rows equals one device, in value, gradient, statistics.

A kind is covered as soon as it stands in `EXCHANGES`. The oracle is the layer
on one device; how many rows leave, and which experts are shadowed, is computed
from the choices by Algorithm 1, which `test_shadowing.py` judges.
"""

import dataclasses
import functools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import routing
from moe_jax.layers import (
  Dropless,
  Einsum,
  FeedForwardExpert,
  Gather,
  ModuleExpert,
  MoE,
  MoeOptions,
)
from moe_jax.layers.routers import Causality, Router, RouterOptions, TokenInfo
from moe_jax.layers.shared import RULES, Shared
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.exchange import (
  AllGather,
  Constraint,
  Exchange,
  InRing,
  permuted,
  target,
)
from moe_jax.parallel.layout import Layout, layout_of
from moe_jax.parallel.ragged import RaggedAllGather, RaggedExchange
from moe_jax.parallel.shadowing import Shadowing, Speeds, choose
from moe_jax.partitioning import make_mesh
from moe_jax.routing.capacity import All
from tests.models.tiny import assert_trees_close

G, S, M, F, E = 8, 12, 5, 6, 8
R = 3
SIZES = Sizes(M, F)
# The network is slow enough for several experts to pay, not for all.
SHADOWING = Shadowing(experts=R, teraflops=2e-5, gigabytes=1e-5)


def mesh_of(**sizes):
  sizes = dict(data=1, fsdp=1, expert=1, tensor=1) | sizes
  return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def put(mesh, x, *axes):
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


@dataclasses.dataclass(frozen=True)
class Gathered(Exchange):
  """A user's own exchange, by one constraint, of which XLA gathers all rows."""

  def move(self, layout, rows, to_experts, number=0):
    groups, experts = layout.groups, layout.experts
    spec = (experts, layout.group_only) if to_experts else ((), groups)
    sharding = NamedSharding(layout.mesh, layout.spec(*spec))
    return jax.lax.with_sharding_constraint(rows, sharding)


@pytest.mark.parametrize('travel', [Constraint(), Gathered()])
def test_told_rows_go_to_their_experts_and_come_back(travel):
  # Two devices have one group each, and an expert takes one row of a group. Row
  # 10 * e + g is that of expert e in group g. Experts 0 and 1 are on device 0,
  # and 2 and 3 on device 1.
  mesh, M = mesh_of(expert=2), 3
  rows = np.array([[10 * e + g for g in range(2)] for e in range(4)], float)
  rows = jnp.asarray(rows[..., None] * np.ones(M), jnp.float32)
  rows_by_device = []

  @jax.jit
  def round_trip(x, rows):
    layout = layout_of(RULES, x, num_experts=4)
    assert layout.exchanged == ('expert',) and layout.group_only == ()
    at_experts = travel.move(layout, rows, True)
    return at_experts, travel.move(layout, at_experts, False)

  x = put(mesh, jnp.zeros((2, 6, M)), 'expert')
  arrived, returned = round_trip(x, put(mesh, rows, None, 'expert'))
  for shard in arrived.addressable_shards:
    rows_by_device.append(np.sort(np.asarray(shard.data)[..., 0], 1).tolist())
  assert rows_by_device == [[[0, 1], [10, 11]], [[20, 21], [30, 31]]]
  np.testing.assert_array_equal(returned, rows)


def test_a_layout_leaves_whole_what_does_not_divide():
  mesh = mesh_of(data=2, expert=2, tensor=2)
  layouts = {}

  def layout_for(groups, num_experts, hidden):
    def run(x):
      layouts['layout'] = layout_of(
        RULES, x, num_experts=num_experts, hidden=hidden
      )
      return x

    x = put(mesh, jnp.zeros((groups, 5, M)))
    jax.jit(run).lower(x)
    return layouts['layout']

  layout = layout_for(4, 6, 10)
  assert layout.groups == ('data', 'expert') and layout.experts == ('expert',)
  assert layout.hidden == ('tensor',)
  assert layout_for(3, 6, 10).groups == ()
  assert layout_for(3, 6, 10).exchanged == ()
  assert layout_for(4, 5, 10).experts == ()
  assert layout_for(4, 6, 9).hidden == ()


def test_one_device_has_no_layout():
  x = jnp.zeros((2, 5, M))
  assert layout_of(RULES, x, num_experts=4) is None


@dataclasses.dataclass(frozen=True)
class ById(RouterOptions):
  """A router that sends each token to the expert with the token's id."""

  reads: ClassVar[tuple[str, ...]] = ('tokens',)

  def module(self, sizes, shared, name=None):
    return ByIdRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return Causality.of_queues(sizes)


class ByIdRouter(Router):
  """A router with learned gates, so that a wrong sum would be seen."""

  def route(self, x, mask, train, token_info, layer):
    index = token_info.tokens[..., None].astype(jnp.int32)
    gate = self.param('gate', jax.random.uniform, (self.sizes.num_experts,))
    chosen = routing.given_choice(
      index,
      gate[index],
      num_experts=self.sizes.num_experts,
      capacity=self.sizes.slots(mask.shape[1]),
      mask=mask,
    )
    aux = routing.empty_aux(self.sizes.num_experts, 1)
    return chosen, aux._replace(stats=routing.routing_stats(chosen, None, mask))


def ids_of(skew):
  """The expert of each token, [G, S]."""
  rng = np.random.default_rng(3)
  p = {
    'uniform': np.ones(E),
    'zipf': 1 / np.arange(1, E + 1) ** 1.5,
    'one': np.eye(E)[5],
  }[skew]
  return rng.choice(E, (G, S), p=p / p.sum()).astype(np.int32)


# Each kind stands with and without shadowed experts, or by masks.
DISPATCHES = {
  'constraint': Gather(Constraint(), SHADOWING),
  'ring': Gather(InRing(), SHADOWING),
  'own': Gather(Gathered(), SHADOWING),
  'masks': Einsum(shadowing=SHADOWING),
  'ring alone': Gather(InRing()),
  'ragged': Dropless(shadowing=SHADOWING),
  'gathered alone': Gather(AllGather()),
  'gathered rows alone': Dropless(exchange=RaggedAllGather()),
}
MESHES = dict(
  four=dict(expert=4),
  eight=dict(expert=8),
  data=dict(data=2, expert=4),
  tensor=dict(expert=4, tensor=2),
)


def layer_of(dispatch, use_bias=True, expert=None):
  expert = expert or FeedForwardExpert(F, activation='swiglu')
  options = MoeOptions(
    E, 1, router=ById(), capacity=All(), expert=expert, dispatch=dispatch
  )
  return MoE(options, Shared(use_bias=use_bias))


def loss(layer, params, x, ids):
  y, aux = layer.apply(params, x, token_info=TokenInfo(ids))
  weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  return (y * weight + y**2).sum(), aux


@functools.cache
def params_of(use_bias):
  """Random parameters, which are the same for all dispatchers."""
  layer, rng = layer_of(Gather(), use_bias), np.random.default_rng(1)
  shapes = jax.eval_shape(
    layer.init,
    jax.random.key(0),
    np.zeros((G, S, M), 'f'),
    token_info=TokenInfo(ids_of('zipf')),
  )
  return jax.tree.map(
    lambda leaf: rng.uniform(-1, 1, leaf.shape).astype('f'),
    nn.meta.unbox(shapes),
  )


@functools.cache
def compiled(dispatch, mesh, use_bias):
  """The compiled value and gradients of a layer, and its arguments.

  The ids of experts, the last argument, may be others of the same sharding.
  """
  layer = layer_of(dispatch, use_bias)
  x = np.random.default_rng(0).normal(0, 1, (G, S, M)).astype(np.float32)
  args = params_of(use_bias), x, ids_of('zipf')
  if mesh:
    mesh = mesh_of(**MESHES[mesh])
    batch = NamedSharding(mesh, PartitionSpec(('data', 'fsdp', 'expert')))
    replicated = NamedSharding(mesh, PartitionSpec())
    args = jax.device_put(args, (replicated, batch, batch))
  run = jax.jit(
    jax.value_and_grad(functools.partial(loss, layer), (0, 1), has_aux=True)
  )
  return run.lower(*args).compile(), args


def result_of(dispatch, skew, mesh=None, use_bias=True):
  """Loss, statistics, and gradients of parameters and tokens."""
  run, (params, x, ids) = compiled(dispatch, mesh, use_bias)
  ids = jax.device_put(ids_of(skew), ids.sharding if mesh else None)
  (value, aux), grads = jax.device_get(run(params, x, ids))
  return value, aux, grads


def assert_same(result, expected):
  """Asserts that loss, statistics and gradients are those of one device."""
  np.testing.assert_allclose(result[0], expected[0], rtol=1e-5)
  aux, one = (r[1]._replace(exchange=()) for r in (result, expected))
  assert_trees_close(aux, one)
  assert_trees_close(result[2], expected[2], rtol=1e-4, atol=1e-4)


def prediction(skew, devices, copies=1, expert_shards=1, shadowed=True):
  """The prediction of Algorithm 1 for the counts of a step.

  There are `copies` of sets of `devices` that exchange rows, and an expert is
  shared by `expert_shards` devices.
  """
  rows_before = rows_after = number = 0
  sizes = SIZES._replace(kernels=3, F=F // expert_shards)
  speeds = Speeds.of_bytes(
    SHADOWING.teraflops * 1e12, SHADOWING.gigabytes * 1e9, sizes
  )
  for ids in ids_of(skew).reshape(copies, devices, -1):
    counts = np.stack([np.bincount(row, minlength=E) for row in ids], axis=1)
    chosen = choose(counts, sizes, speeds, most=R if shadowed else 0)
    away = counts.sum(1) - counts[np.arange(E), np.arange(E) * devices // E]
    rows_before += away.sum()
    number += (chosen < E).sum()
    rows_after += np.delete(away, chosen[chosen < E]).sum()
  return rows_before, rows_after, number, copies, 0


# A dispatch has one program for all kinds of routing on a mesh.
CASES = [
  *((kind, 'data', ('zipf', 'one')) for kind in DISPATCHES),
  *(
    (kind, 'tensor', ('zipf',))
    for kind in (
      'constraint',
      'ragged',
      'gathered alone',
      'gathered rows alone',
    )
  ),
  ('ring alone', 'eight', ('uniform',)),
]
FAST = ('constraint', 'ring', 'own', 'ragged', 'gathered rows alone')


def marks(kind, mesh):
  return () if mesh == 'data' and kind in FAST else pytest.mark.slow


@pytest.mark.parametrize(
  ('kind', 'mesh', 'skews'),
  [pytest.param(*case, marks=marks(*case[:2])) for case in CASES],
)
def test_loss_gradients_and_rows_that_leave(kind, mesh, skews):
  # Dropless experts with biases would not split their hidden width.
  use_bias = mesh != 'tensor'
  sizes = dict(data=1, tensor=1) | MESHES[mesh]
  counts = sizes['expert'], sizes['data'], sizes['tensor']
  for skew in skews:
    result = result_of(DISPATCHES[kind], skew, mesh, use_bias)
    assert_same(result, result_of(Gather(), skew, None, use_bias))
    expected = prediction(skew, *counts, 'alone' not in kind)
    np.testing.assert_allclose(result[1].exchange, expected, rtol=1e-6)
    before, after, number, copies, _ = expected
    if skew == 'zipf' and 'alone' not in kind:
      assert 0 < after < before and 0 < number < R * copies


@pytest.mark.parametrize(
  ('fraction', 'slots', 'room'),
  # In floating point 0.55 x 100 is more than 55, and 0.07 x 100 more than 7.
  [(0.55, 100, 55), (0.07, 100, 7), (0.3, 7, 3), (0.01, 5, 1), (1.0, 6, 6)],
)
def test_room_is_the_exact_share_rounded_up(fraction, slots, room):
  assert Constraint(capacity_fraction=fraction).capacity(slots) == room
  assert RaggedExchange(capacity_fraction=fraction).bound(slots) == room


@pytest.mark.parametrize(
  'dispatch',
  [
    Gather(InRing(capacity_fraction=0.25)),
    pytest.param(
      Gather(Constraint(capacity_fraction=0.25)), marks=pytest.mark.slow
    ),
    pytest.param(
      Dropless(exchange=RaggedExchange(capacity_fraction=0.25)),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_rows_without_room_are_dropped_and_counted(dispatch):
  # All tokens choose one expert. On four devices it has room for 6 of the 24
  # tokens of a device; without slots a device has room for a quarter of 96
  # rows.
  _, aux, (_, tokens) = result_of(dispatch, 'one', 'four')
  dropped = G * S * 3 // 4
  assert aux.exchange.overflow == dropped
  # A dropped token has no output, and so no gradient.
  assert (np.abs(tokens).sum(-1) == 0).sum() == dropped


def test_rows_of_shadowed_experts_need_no_room():
  little = Gather(InRing(capacity_fraction=0.25), SHADOWING)
  result = result_of(little, 'one', 'four')
  assert result[1].exchange.overflow == 0
  assert_same(result, result_of(Gather(), 'one'))


@pytest.mark.slow
def test_a_custom_expert_travels_too_and_is_not_shadowed():
  ids, x = ids_of('zipf'), np.ones((G, S, M), 'f') + np.arange(M, dtype='f')
  split = NamedSharding(mesh_of(expert=8), PartitionSpec('expert'))
  x_parts, ids_parts = jax.device_put((x, ids), split)

  def run(shadowing, params, x, ids):
    dense = ModuleExpert(nn.Dense(M))
    layer = layer_of(Gather(shadowing=shadowing), expert=dense)
    info = TokenInfo(ids)
    params = params or layer.init(jax.random.key(0), x, token_info=info)
    return params, layer.apply(params, x, token_info=info)[0]

  params, expected = run(Shadowing(), None, x, ids)
  _, y = jax.jit(functools.partial(run, Shadowing()))(
    params, x_parts, ids_parts
  )
  np.testing.assert_allclose(y, expected, atol=1e-5)
  with pytest.raises(ValueError, match='experts=3 needs feed-forward experts'):
    jax.eval_shape(
      functools.partial(run, SHADOWING), params, x_parts, ids_parts
    )


# Tests of the ring follow.


def test_the_ring_goes_to_all_devices_as_published():
  mesh = mesh_of(expert=8).abstract_mesh
  layout = Layout(mesh, {'expert': 8}, ('expert',), ('expert',), ())
  # In step j device i sends to device i - j; step 0 stays on the device.
  sent = [target(layout, 2, step) for step in range(8)]
  assert sent == [2, 1, 0, 7, 6, 5, 4, 3]


def test_a_ring_along_axes_in_another_order_than_the_meshs():
  mesh, axes = mesh_of(fsdp=2, expert=2), ('expert', 'fsdp')
  layout = Layout(
    mesh.abstract_mesh, {'fsdp': 2, 'expert': 2}, axes[::-1], axes, ()
  )

  def travel():
    me = jax.lax.axis_index(axes).astype(float).reshape(1, 1)
    there = permuted(layout, me, 1)
    return there, permuted(layout, there, 1, to_experts=False)

  run = jax.shard_map(
    travel, mesh=mesh, in_specs=(), out_specs=PartitionSpec(axes)
  )
  arrived, returned = jax.jit(run)()
  # A device receives from the next one.
  assert arrived.ravel().tolist() == [1, 2, 3, 0]
  assert returned.ravel().tolist() == [0, 1, 2, 3]


# Tests of compiled programs follow.

LINE = re.compile(r'^\s*(?:ROOT )?%([\w.\-]+) = .*? ([\w\-]+)\((.*)$')


def instructions(text):
  """The entry computation's instructions: name -> (kind, operands, line)."""
  entry = text[text.index('\nENTRY') :]
  program = {}
  for line in entry.splitlines():
    if match := LINE.match(line):
      name, kind, rest = match.groups()
      operands = re.findall(r'%([\w.\-]+)', rest.split(', metadata')[0])
      program[name] = kind, operands, line
  return program


def ancestors(program, name):
  names, pending = set(), [name]
  while pending:
    for operand in program[pending.pop()][1]:
      if operand in program and operand not in names:
        names.add(operand)
        pending.append(operand)
  return names


@pytest.mark.slow
def test_a_step_is_one_permutation_and_waits_for_no_other_steps_product():
  # Without shadows, so that the permutations are all collectives on rows.
  layer, devices = layer_of(Gather(InRing())), 4
  x = np.random.default_rng(0).normal(0, 1, (G, S, M)).astype(np.float32)
  ids, params = ids_of('zipf'), params_of(True)
  mesh = mesh_of(expert=devices)
  x, ids = jax.device_put(
    (x, ids), NamedSharding(mesh, PartitionSpec('expert'))
  )
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  run = jax.jit(lambda *a: layer.apply(*a[:2], token_info=TokenInfo(a[2]))[0])
  program = instructions(run.lower(params, x, ids).compile().as_text())
  travels = [
    name for name, line in program.items() if line[0] == 'collective-permute'
  ]
  # Rows travel to each other device and back.
  assert len(travels) == 2 * (devices - 1)
  before = {name: ancestors(program, name) for name in travels}
  products = {
    name
    for name, (_, _, line) in program.items()
    if re.search(r'op_name="[^"]*experts(?:/[\w.]+)*/dot_general', line)
  }
  outgoing = {name for name in travels if not before[name] & set(travels)}
  assert len(outgoing) == devices - 1  # no step waits for another one
  assert not any(before[name] & products for name in outgoing)
  multiplied = []
  for name in set(travels) - outgoing:
    # Rows that come back were multiplied after one step alone: their products
    # are their own, and wait for no other exchange.
    assert len(before[name] & outgoing) == 1
    waits = {
      product: ancestors(program, product) & set(travels)
      for product in before[name] & products
    }
    assert all(wait <= before[name] & outgoing for wait in waits.values())
    # Kernels are read at once for all steps, and wait for none.
    multiplied.append({product for product, wait in waits.items() if wait})
  assert all(multiplied) and len(set.union(*multiplied)) == sum(
    map(len, multiplied)
  )
