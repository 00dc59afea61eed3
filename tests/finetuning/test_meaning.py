"""Options that decide nothing that a model computes are left out."""

import dataclasses

import pytest

from moe_jax import All, PerToken, TokenChoice
from moe_jax.config import fields_of
from moe_jax.finetuning.meaning import difference
from moe_jax.layers.routers import ROUTERS, Hierarchical
from tests.models import tiny


def options_of(router, **moe):
  moe = dict(num_experts=6, num_selected=2, allow_future_leak=True, **moe)
  return tiny.options(dict(router=router, **moe))


QUEUES = [
  kind
  for kind, cls in ROUTERS.builtin.items()
  if 'slot_priority' in fields_of(cls)
]


@pytest.mark.parametrize('kind', QUEUES)
def test_the_order_of_service_does_not_matter_if_nothing_is_dropped(kind):
  router = ROUTERS.builtin[kind]()
  if isinstance(router, Hierarchical):
    router = dataclasses.replace(router, branches_selected=2)
  other = dataclasses.replace(router, slot_priority='choice_major')
  for capacity, names in (
    (All(), set()),
    (PerToken(factor=0.8), {'moe.router.slot_priority'}),
  ):
    pair = (options_of(r, capacity=capacity) for r in (router, other))
    assert difference(*pair).keys() == names


def test_the_rate_of_a_balancing_bias_is_one_of_training():
  def options(rate):
    gates = 'sigmoid' if rate else 'raw'
    return options_of(TokenChoice(gates=gates, balance_bias_rate=rate))

  assert not difference(options(0.1), options(0.01))
  assert 'moe.router.balance_bias_rate' in difference(
    options(0.1), options(0.0)
  )
