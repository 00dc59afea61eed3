"""Meshes and sharding tables refuse axes and sizes that do not fit."""

import jax
import pytest

from moe_jax.partitioning import (
  MeshOptions,
  ShardingOptions,
  make_mesh,
  sharding,
)
from tests.bad_inputs.cases import Case, check


def case(name, f, *phrases):
  return Case(name, lambda folder: f(), phrases)


def mesh(count=4, **sizes):
  return make_mesh(sizes, jax.devices()[:count])


def shard(axes, shape=None, **table):
  options = ShardingOptions(batch='data', embed='fsdp', **table)
  rules = tuple(r for r in options.rules if r[0] in ('batch', 'embed', *table))
  return sharding(mesh(data=2, fsdp=2), rules, axes, shape, 'w')


CASES = [
  case(f'mesh-{sizes}', lambda sizes=sizes: mesh(**sizes), *phrases)
  for sizes, phrases in (
    ({'fsdp': 3}, ('multiply to 3', '4 devices')),
    ({'data': 3, 'fsdp': -1}, ('multiply to 3', '4 devices')),
    ({'data': 8}, ('multiply to 8', '4 devices')),
    ({'dta': 2}, ("'dta'", "'data'")),
    ({'dcn_data': 3, 'data': -1}, ('4 devices',)),
    ({'count': 0}, ('0 devices',)),
    ({'count': 0, 'data': -1}, ('0 devices',)),
  )
]
CASES += [
  case(f'options-{sizes}', lambda sizes=sizes: MeshOptions(**sizes), *phrases)
  for sizes, phrases in (
    ({'data': 0}, ('data=0', 'at least 1')),
    ({'expert': -3}, ('expert=-3', '-1')),
    ({'data': -1, 'fsdp': -1}, ('fsdp=-1', 'data=-1')),
    ({'tensor': 1.5}, ('tensor=1.5', 'int')),
    ({'tensor': True}, ('tensor=True', 'int')),
    ({'tensor': '2'}, ("tensor='2'", 'int')),
    ({'tensor': None}, ('tensor=None', 'int')),
    ({'dcn_fsdp': 0}, ('dcn_fsdp=0', 'at least 1')),
  )
]
CASES += [
  case(f'table-{axes!r}', lambda axes=axes: ShardingOptions(mlp=axes), *phrases)
  for axes, phrases in (
    ('tensor,tensor', ("mlp='tensor,tensor'", "'tensor' twice")),
    ('fsdp, data ,fsdp', ("'fsdp' twice",)),
    ('tensr', ("mlp='tensr'", "'tensor'")),
    ('data;fsdp', ("'data;fsdp'", "'data'")),
    (None, ('mlp=None', 'str')),
    (3, ('mlp=3', 'str')),
  )
]
CASES += [
  case(
    'two dimensions',
    lambda: shard(('batch', 'batch')),
    "'batch'",
    "'data'",
  ),
  case('no rule', lambda: shard(('heads',)), "'heads'", "'batch'", 'w'),
  case('odd', lambda: shard(('batch',), (3,)), 'batch=3', '2 devices', 'w'),
  case('rank', lambda: shard(('batch',), (4, 4)), '(4, 4)', "('batch',)"),
]


@pytest.mark.parametrize('case', CASES, ids=Case.id)
def test_refused(case, tmp_path):
  check(case, tmp_path)
