"""The line at a run's start says who moves rows and who multiplies them."""

import pytest

from moe_jax.layers.experts import Dropless, Gather, Sorted, describe
from moe_jax.parallel.exchange import InRing
from moe_jax.parallel.shadowing import Shadowing


@pytest.mark.parametrize(
  ('dispatch', 'platform', 'devices', 'text'),
  [
    (Gather(), 'cpu', {}, "'gather'"),
    (
      Gather(InRing(), Shadowing(experts=2)),
      'tpu',
      {'expert': 4, 'fsdp': 2},
      "'gather' (exchange 'ring' over expert=4, fsdp=2; up to 2 experts "
      'shadowed)',
    ),
    (Sorted(), 'cuda', {}, "'sorted' (grouped products: pallas_gpu)"),
    (
      Dropless(),
      'cpu',
      {'expert': 8},
      "'dropless' (grouped products: blocks; exchange 'all_to_all' over "
      'expert=8)',
    ),
  ],
)
def test_a_dispatch_is_described(dispatch, platform, devices, text):
  assert describe(dispatch, platform, devices) == text
