"""The exchange of rows by itself: rows by hand, and overlapping pieces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.layers import (
  FeedForwardExpert,
  ModuleExpert,
  MoE,
  MoeOptions,
)
from moe_jax.layers.routers import TokenChoice
from moe_jax.layers.shared import RULES
from moe_jax.parallel import exchange
from moe_jax.parallel.exchange import Constraint
from moe_jax.parallel.layout import layout_of
from moe_jax.parallel.ragged import RaggedExchange
from moe_jax.partitioning import make_mesh

E, M = 4, 3


def mesh_of(**sizes):
  sizes = dict(data=1, fsdp=1, expert=1, tensor=1) | sizes
  count = int(np.prod(list(sizes.values())))
  return make_mesh(sizes, jax.devices()[:count])


def put(mesh, x, *axes):
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


def test_told_rows_go_to_their_experts_and_come_back():
  # Two devices have one group each, and an expert takes one row of a group. Row
  # 10 * e + g is that of expert e in group g. Experts 0 and 1 are on device 0,
  # and 2 and 3 on device 1.
  mesh = mesh_of(expert=2)
  rows = np.array([[10 * e + g for g in range(2)] for e in range(E)], float)
  rows = jnp.asarray(rows[..., None] * np.ones(M), jnp.float32)
  travel, rows_by_device = Constraint(), []

  @jax.jit
  def round_trip(x, rows):
    layout = layout_of(RULES, x, num_experts=E)
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
  assert layout_of(RULES, x, num_experts=E) is None


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
def test_the_compiler_makes_two_all_to_alls_of_constraints():
  layer = MoE(
    MoeOptions(
      num_selected=2,
      router=TokenChoice(gates='renormalized'),
      expert=FeedForwardExpert(24),
    )
  )
  mesh = mesh_of(expert=8)
  x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (8, 16, 12)), 'float32')
  params = layer.init(jax.random.key(0), x)
  split = put(mesh, x, 'expert')
  run = jax.jit(lambda params, x: layer.apply(params, x)[0])
  compiled = run.lower(put(mesh, params), split).compile()
  np.testing.assert_allclose(
    compiled(put(mesh, params), split), run(params, x), rtol=1e-4, atol=1e-5
  )
  program = instructions(compiled.as_text())
  kinds = [kind for kind, _, _ in program.values()]
  assert kinds.count('all-to-all') == 2


@pytest.mark.slow
def test_a_custom_expert_travels_too():
  layer = MoE(
    MoeOptions(
      4,
      2,
      router=TokenChoice(gates='renormalized'),
      expert=ModuleExpert(nn.Dense(12)),
    )
  )
  x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 16, 12)), 'float32')
  params = layer.init(jax.random.key(0), x)
  mesh = mesh_of(expert=4)
  run = jax.jit(lambda params, x: layer.apply(params, x)[0])
  np.testing.assert_allclose(
    run(put(mesh, params), put(mesh, x, 'expert')), run(params, x), atol=1e-5
  )


@pytest.mark.parametrize(
  ('fraction', 'slots', 'room'),
  # In floating point 0.55 x 100 is more than 55, and 0.07 x 100 more than 7.
  [(0.55, 100, 55), (0.07, 100, 7), (0.3, 7, 3), (0.01, 5, 1), (1.0, 6, 6)],
)
def test_room_is_the_exact_share_rounded_up(fraction, slots, room):
  assert Constraint(capacity_fraction=fraction).capacity(slots) == room
  assert RaggedExchange(capacity_fraction=fraction).bound(slots) == room


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match=r'capacity_fraction=0.0 .*\(0, 1\]'):
    Constraint(capacity_fraction=0.0)
  with pytest.raises(
    ValueError, match="'constrain'; did you mean 'constraint'"
  ):
    exchange.EXCHANGES.get('constrain')
