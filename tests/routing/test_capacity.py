"""Rules of capacity in exact arithmetic."""

import itertools

import pytest

from moe_jax.routing import All
from moe_jax.routing.capacity import (
  CAPACITIES,
  Fixed,
  Fraction,
  PerAssignment,
  PerToken,
)
from tests import reference


def slots(S, E, K, capacity):
  return capacity.per_expert(S, E, K)


def test_what_the_papers_mean_by_a_capacity_factor():
  # With 64 tokens, 8 experts and top-2 an even split is 8 tokens or 16 choices
  # for each expert.
  assert slots(64, 8, 2, PerToken(factor=1.25)) == 10
  assert slots(64, 8, 2, PerAssignment(factor=1.25)) == 20  # V-MoE
  gshard = slots(64, 8, 2, PerToken(factor=2.0))
  assert gshard == slots(64, 8, 2, PerAssignment(factor=1.0)) == 16


def test_rounding_then_minimum_then_multiple_then_the_group():
  # The unrounded capacity is 1.1 * 10 / 4 = 2.75.
  assert slots(10, 4, 1, PerToken(factor=1.1, rounding='floor')) == 2
  assert slots(10, 4, 1, PerToken(factor=1.1, rounding='ceil')) == 3
  # Halves are rounded to even: 2.5 down, 3.5 up.
  assert slots(10, 4, 1, PerToken(factor=1.0, rounding='round')) == 2
  assert slots(14, 4, 1, PerToken(factor=1.0, rounding='round')) == 4
  assert slots(10, 4, 1, PerToken(factor=1.1, minimum=5, multiple=4)) == 8
  # An expert never needs more slots than there are tokens, whatever the
  # multiple.
  assert slots(10, 4, 1, PerToken(factor=1.1, minimum=5, multiple=16)) == 10
  assert slots(10, 4, 1, Fixed(slots=3)) == 3
  assert slots(10, 4, 1, Fixed(slots=30)) == 10
  assert slots(10, 4, 3, All()) == 10


def test_the_quotient_is_exact():
  # In floating point 1.1 * 100 / 10 is a little over 11: one slot too many.
  assert slots(100, 10, 1, PerToken(factor=1.1)) == 11
  # There 1.15 * 100 / 5 is a little under 23: one slot too few.
  assert slots(100, 5, 1, PerToken(factor=1.15, rounding='floor')) == 23


@pytest.mark.parametrize('rounding', ['ceil', 'floor', 'round'])
@pytest.mark.parametrize('rule', CAPACITIES.builtin)
def test_capacity_follows_the_definition(rule, rounding):
  cases = itertools.product(
    ((1, 1), (5, 4), (2, 1), (1, 10), (29, 100)),  # factors, as fractions
    ((1, 1), (4, 1), (1, 4), (4, 6)),  # multiple, minimum
    ((1, 1, 1), (7, 5, 3), (100, 3, 2), (24, 16, 2), (4096, 64, 1)),  # S, E, K
  )
  for factor, (multiple, minimum), (S, E, K) in cases:
    quotient = factor[0] / factor[1]
    share = dict(
      factor=quotient, rounding=rounding, multiple=multiple, minimum=minimum
    )
    options = {
      'per_token': share,
      'per_assignment': share,
      'fraction': dict(factor=quotient),
      'fixed': dict(slots=9),
      'all': {},
    }[rule]
    num_slots = slots(S, E, K, CAPACITIES.builtin[rule](**options))
    assert isinstance(num_slots, int) and 1 <= num_slots <= S
    assert num_slots == reference.capacity(
      rule, factor, rounding, multiple, minimum, 9, S=S, E=E, K=K
    ), (factor, multiple, minimum, S, E, K)


def test_only_room_for_all_never_binds():
  assert not All().binds
  for other in (PerToken(), PerAssignment(), Fraction(), Fixed()):
    assert other.binds


def test_generation_keeps_the_capacities_that_a_checkpoint_computes_with():
  # A fixed number of slots never drops where each group has a single token.
  for single in (False, True):
    assert Fraction().keeps_in_generation(single)
    assert Fixed().keeps_in_generation(single) != single
    for other in (PerToken(), PerAssignment(), All()):
      assert not other.keeps_in_generation(single)
