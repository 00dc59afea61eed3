"""Capacity rules in exact arithmetic, and which settings leak the future."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import gather
from moe_jax.routing import (
  CAPACITY_RULES,
  GATES,
  SLOT_PRIORITIES,
  CapacityRule,
  Routing,
  is_causal,
  token_choice,
)
from tests import reference


def slots(S, E, K, **rule):
  return CapacityRule(**rule)(group_size=S, num_experts=E, num_selected=K)


def test_what_the_papers_mean_by_a_capacity_factor():
  # 64 tokens, 8 experts, top-2: an even split is 8 tokens or 16 choices each.
  switch = slots(64, 8, 2, rule='per_token', factor=1.25)
  assert switch == 10  # 1.25 * 64 / 8: 0.625 slots per choice
  vmoe = slots(64, 8, 2, rule='per_assignment', factor=1.25)
  assert vmoe == 20
  gshard = slots(64, 8, 2, rule='per_token', factor=2.0)
  assert gshard == slots(64, 8, 2, rule='per_assignment', factor=1.0) == 16


def test_rounding_then_minimum_then_multiple_then_the_group():
  # 1.1 * 10 / 4 = 2.75.
  assert slots(10, 4, 1, factor=1.1, rounding='floor') == 2
  assert slots(10, 4, 1, factor=1.1, rounding='ceil') == 3
  # Half goes to even: 2.5 down, 3.5 up.
  assert slots(10, 4, 1, factor=1.0, rounding='round') == 2
  assert slots(14, 4, 1, factor=1.0, rounding='round') == 4
  assert slots(10, 4, 1, factor=1.1, minimum=5, multiple=4) == 8
  # Nobody needs more slots than there are tokens, whatever the multiple.
  assert slots(10, 4, 1, factor=1.1, minimum=5, multiple=16) == 10
  assert slots(10, 4, 1, rule='fixed', slots=3) == 3
  assert slots(10, 4, 1, rule='fixed', slots=30) == 10
  assert slots(10, 4, 3, rule='all') == 10


def test_the_quotient_is_exact():
  # In floating point 1.1 * 100 / 10 is a little over 11: one slot too many.
  assert slots(100, 10, 1, factor=1.1) == 11
  # And 1.15 * 100 / 5 is a little under 23: one slot too few.
  assert slots(100, 5, 1, factor=1.15, rounding='floor') == 23


@pytest.mark.parametrize('rounding', ['ceil', 'floor', 'round'])
@pytest.mark.parametrize('rule', CAPACITY_RULES)
def test_capacity_follows_the_definition(rule, rounding):
  cases = itertools.product(
    ((1, 1), (5, 4), (2, 1), (1, 10), (29, 100)),  # factors, as fractions
    ((1, 1), (4, 1), (1, 4), (4, 6)),  # multiple, minimum
    ((1, 1, 1), (7, 5, 3), (100, 3, 2), (24, 16, 2), (4096, 64, 1)),  # S, E, K
  )
  for factor, (multiple, minimum), (S, E, K) in cases:
    got = slots(
      S,
      E,
      K,
      rule=rule,
      factor=factor[0] / factor[1],
      rounding=rounding,
      multiple=multiple,
      minimum=minimum,
      slots=9,
    )
    assert isinstance(got, int) and 1 <= got <= S
    assert got == reference.capacity(
      rule, factor, rounding, multiple, minimum, 9, S=S, E=E, K=K
    ), (factor, multiple, minimum, S, E, K)


@pytest.mark.parametrize(
  ('wrong', 'words'),
  [
    ({'rule': 'per_tokens'}, r"capacity_rule 'per_tokens'.*'per_token'"),
    ({'rounding': 'up'}, r"capacity_rounding 'up'.*'ceil'"),
    ({'rule': 'fixed'}, 'slots=0 >= 1'),
    ({'factor': 0.0}, 'capacity_factor=0.0 must be positive'),
    ({'factor': float('nan')}, 'capacity_factor=nan'),
    ({'factor': float('inf')}, 'capacity_factor=inf'),
    ({'multiple': 0}, 'capacity_multiple=0 must be >= 1'),
    ({'minimum': 0}, 'capacity_minimum=0 must be >= 1'),
  ],
)
def test_capacity_rule_refuses(wrong, words):
  with pytest.raises(ValueError, match=words):
    CapacityRule(**wrong)


def test_a_routing_carries_its_sizes_through_jit_as_python_ints():
  routing = token_choice(jnp.zeros((2, 7, 5)), num_selected=3, capacity=4)
  assert len(jax.tree.leaves(routing)) == 4
  seen = []

  @jax.jit
  def double_gates(routing):
    seen.append((routing.num_experts, routing.capacity))
    return jax.tree.map(lambda x: x * 2, routing)

  out = double_gates(routing)
  assert isinstance(out, Routing)
  assert seen == [(5, 4)]
  assert (out.num_experts, out.capacity) == (5, 4)
  np.testing.assert_array_equal(out.gate, 2 * routing.gate)


# All but 'all' leave 1 or 2 slots for 7 tokens and 5 experts: they bind.
_RULES = {
  'per_token': CapacityRule('per_token', factor=1.0),
  'per_assignment': CapacityRule('per_assignment', factor=0.4),
  'fraction': CapacityRule('fraction', factor=0.2),
  'fixed': CapacityRule('fixed', slots=2),
  'all': CapacityRule('all'),
}
_SETTINGS = [
  {'slot_priority': priority, 'num_selected': K, 'capacity_rule': rule}
  for priority in SLOT_PRIORITIES
  for K in (1, 2, 3)
  for rule in CAPACITY_RULES
]
_CAUSAL = [setting for setting in _SETTINGS if is_causal(**setting)]
_LEAKING = [setting for setting in _SETTINGS if not is_causal(**setting)]


def _name(setting):
  return '-'.join(str(value) for value in setting.values())


def before_and_after(setting, *, trials=60, **options):
  """What tokens up to t got in `trials` groups, before and after t+1.. changed.

  Returns two dicts of arrays [trials, S, ...], zero after t.
  """
  S, E = 7, 5
  K = setting['num_selected']
  C = _RULES[setting['capacity_rule']](
    group_size=S, num_experts=E, num_selected=K
  )
  keys = jax.random.split(jax.random.key(0), 4)
  old = jax.random.normal(keys[0], (trials, S, E))
  new = jax.random.normal(keys[1], (trials, S, E))
  x = jax.random.normal(keys[2], (2, trials, S, 3))
  t = np.random.default_rng(0).integers(0, S - 1, (trials, 1))
  past = (np.arange(S)[None] <= t)[..., None]  # [trials, S, 1]

  def run(logits, x):
    routing = token_choice(
      logits,
      num_selected=K,
      capacity=C,
      slot_priority=setting['slot_priority'],
      key=keys[3],
      **options,
    )
    rows = gather.dispatch(x, routing)
    rows = rows * jnp.arange(1.0, E + 1)[:, None, None]
    seen = {
      'kept': routing.kept,
      'slot': routing.slot,
      'gate': routing.gate,
      'y': gather.combine(rows, routing),
    }
    return {name: np.where(past, value, 0) for name, value in seen.items()}

  return run(old, x[0]), run(
    jnp.where(past, old, new), jnp.where(past, x[0], x[1])
  )


@pytest.mark.parametrize('setting', _CAUSAL, ids=_name)
def test_a_causal_setting_does_not_see_later_tokens(setting):
  K = setting['num_selected']
  policies = ['all', 'threshold'] + ['sampled'] * (K == 2)
  for gates in GATES if K > 1 else ['raw']:
    for policy in policies:
      old, new = before_and_after(setting, gates=gates, second_policy=policy)
      if setting['capacity_rule'] == 'all':
        # With room for all, a later token may move an earlier one to another
        # slot of the same expert; nothing is computed differently.
        del old['slot']
      for name in old:
        np.testing.assert_array_equal(old[name], new[name], err_msg=name)


@pytest.mark.parametrize('setting', _LEAKING, ids=_name)
def test_a_leaking_setting_does_see_later_tokens(setting):
  old, new = before_and_after(setting)
  assert (old['kept'] != new['kept']).any()
  assert (old['gate'] != new['gate']).any()
  assert (old['y'] != new['y']).any()


def test_three_ways_to_be_causal():
  # Token-major; a single choice in order; room for every token.
  assert len(_CAUSAL) == 15 + 4 + (3 + 3)
  assert len(_LEAKING) == 2 * 4 + 3 * 4
