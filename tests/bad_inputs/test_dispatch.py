"""Dispatchers and grouped products refuse rows and routings that do not fit."""

import copy
import dataclasses

import jax.numpy as jnp
import pytest

from moe_jax import kernels, routing
from moe_jax.kernels.grouped_products import check_shapes
from moe_jax.routing import Routing
from moe_jax.routing.dispatch import einsum, gather, sorted_rows
from tests.bad_inputs.cases import Case, check

G, S, E, K, C, M = 2, 7, 5, 3, 4, 8


def bool_ones(*shape):
  return jnp.ones(shape, bool)


CHOSEN = Routing(
  expert_index=jnp.zeros((G, S, K), jnp.int32),
  slot=jnp.zeros((G, S, K), jnp.int32),
  gate=jnp.ones((G, S, K)),
  kept=bool_ones(G, S, K),
  num_experts=E,
  capacity=C,
)
SLOTS = Routing.of_slots(
  token_index=jnp.zeros((G, E, C), jnp.int32),
  gate=jnp.ones((G, E, C)),
  group_size=S,
)
X = jnp.ones((G, S, M))
MOVERS = {'einsum': einsum, 'gather': gather, 'sorted': sorted_rows}


def case(name, f, *arguments, phrases):
  return Case(name, lambda folder: f(*arguments), phrases)


def changed(**changes):
  """A routing with changes that the tests' hook would refuse to make."""
  chosen = copy.copy(CHOSEN)
  for name, value in changes.items():
    object.__setattr__(chosen, name, value)
  return chosen


CASES = [
  case(f'{name}-{defect}', mover.dispatch, x, chosen, phrases=phrases)
  for name, mover in MOVERS.items()
  for defect, x, chosen, phrases in (
    ('tokens', X[:, 1:], CHOSEN, ('(2, 6, 8)', '(2, 7, 3)')),
    ('groups', X[:1], CHOSEN, ('(1, 7, 8)', '(2, 7, 3)')),
    ('rank', X[0], CHOSEN, ('(7, 8)', '[G, S, M]')),
    ('integers', X.astype(int), CHOSEN, ('x', 'int32', 'float')),
    ('gate', X, changed(gate=CHOSEN.gate[..., 1:]), ('gate', '(2, 7, 2)')),
    ('kept', X, changed(kept=CHOSEN.gate), ('kept', 'float32', 'bool')),
    ('slot', X, changed(slot=CHOSEN.slot[:1]), ('slot', '(1, 7, 3)')),
    ('no experts', X, changed(num_experts=0), ('E=0',)),
    ('capacity 0', X, changed(capacity=0), ('capacity=0',)),
    ('capacity .5', X, changed(capacity=2.5), ('capacity=2.5',)),
    ('capacity True', X, changed(capacity=True), ('capacity=True',)),
    (
      'slots of others',
      X,
      dataclasses.replace(SLOTS, num_tokens=6),
      ('S=6', '(2, 7, 8)'),
    ),
    (
      'gates of slots',
      X,
      dataclasses.replace(SLOTS, gate=SLOTS.gate[:, 1:]),
      ('(2, 4, 4)', '(2, 5, 4)'),
    ),
  )
]
CASES += [
  case(
    f'{name}-rows {shape}',
    mover.combine,
    jnp.ones(shape),
    CHOSEN,
    phrases=phrases,
  )
  for name, mover, shapes in (
    (
      'einsum',
      einsum,
      {(E, 7, M): ('(5, 7, 8)', '(5, 8)'), (E, M): ('(5, 8)', '[E, R, M]')},
    ),
    (
      'gather',
      gather,
      {(E, 7, M): ('(5, 7, 8)', '(5, 8)'), (3, 8, M): ('E=5', '(3, 8, 8)')},
    ),
    (
      'sorted',
      sorted_rows,
      {(3, M): ('(3, 8)', '(40,)'), (E, 8, M): ('(5, 8, 8)', '[N, M]')},
    ),
  )
  for shape, phrases in shapes.items()
]
CASES += [
  case(
    f'{name}-unbounded',
    mover.dispatch,
    X,
    changed(capacity=None),
    phrases=('capacity=None', 'All()'),
  )
  for name, mover in MOVERS.items()
  if name != 'sorted'
]
ROWS, KERNEL = jnp.ones((9, M)), jnp.ones((E, M, 6))
SIZES = jnp.ones(E, jnp.int32)
CASES += [
  case(f'product-{name}', check_shapes, *arguments, phrases=phrases)
  for name, arguments, phrases in (
    ('sizes', (ROWS, KERNEL, SIZES[1:]), ('4 group sizes', '5 experts')),
    ('width', (ROWS[:, 1:], KERNEL, SIZES), ('width 7', 'M=8')),
    ('rank of rows', (ROWS[0], KERNEL, SIZES), ('(8,)', '[N, M]')),
    ('rank of kernels', (ROWS, KERNEL[0], SIZES), ('(8, 6)', '[E, M, F]')),
    ('rank of sizes', (ROWS, KERNEL, SIZES[None]), ('(1, 5)', '[E]')),
    ('float sizes', (ROWS, KERNEL, SIZES * 1.0), ('float32', 'integers')),
  )
]
CASES += [
  case(
    'product-backend',
    kernels.grouped_matmul,
    *(ROWS, KERNEL, SIZES, 'cuda'),
    phrases=("'cuda'", "'blocks'"),
  )
]
CASES += [
  case(
    f'statistics-{name}',
    routing.routing_stats,
    CHOSEN,
    logits,
    mask,
    phrases=phrases,
  )
  for name, logits, mask, phrases in (
    ('mask', None, bool_ones(G, 6), ('(2, 6)', '(2, 7, 3)')),
    ('logits', jnp.ones((G, S, 4)), bool_ones(G, S), ('(2, 7, 4)', 'E=5')),
  )
]


@pytest.mark.parametrize('case', CASES, ids=Case.id)
def test_refused(case, tmp_path):
  check(case, tmp_path)
