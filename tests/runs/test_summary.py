"""The numbers of a row of metrics, by hand from sums over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.routing import empty_aux
from moe_jax.routing.stats import ExchangeStats
from moe_jax.runs import summary
from moe_jax.runs.summary import LossSums
from tests import own_kinds

# A dense layer, one of three experts, and one of four.
MOES = (None, MoeOptions(3, 2), MoeOptions(4, 2))


LOSSES = ('balance_loss', 'z_loss', 'sequence_balance_loss')


def numpy_aux(stats=(), **sums):
  """The sums of a layer with room for four experts, and K = 2 choices."""
  aux = jax.tree.map(np.asarray, empty_aux(4, 2, LOSSES))
  return aux._replace(stats=aux.stats._replace(**dict(stats)), **sums)


def sums_of_three_layers():
  """Eight tokens of sparse layers, and losses of five tokens."""
  # The experts serve 13 of 16 choices; two second choices found their expert
  # full, and one was not sent.
  first = numpy_aux(
    dict(
      tokens=8.0, load=[8.0, 4, 4, 0], kept_load=[5.0, 4, 4, 0],
      overflowed=[0.0, 2], unsent=[0.0, 1], entropy=4.0, logit_square=18.0,
    ),
    losses=dict(balance_loss=12.0, z_loss=4.0, sequence_balance_loss=2.0),
    exchange=ExchangeStats(
      away=6.5, sent=2.6, shadowed=3.0, choices=2.0, overflow=1.3
    ),
  )  # fmt: skip
  second = numpy_aux(
    dict(
      tokens=8.0, load=[4.0] * 4, kept_load=[4.0, 4, 2, 0],
      overflowed=[2.0, 4],
    ),
  )  # fmt: skip
  aux = jax.tree.map(
    lambda *leaves: np.stack([np.asarray(leaf, float) for leaf in leaves]),
    *(numpy_aux(), first, second),
    is_leaf=lambda leaf: isinstance(leaf, list),
  )
  return LossSums(20.0, 5.0, 0.0, aux)


def test_a_row_by_hand():
  row = summary.summarize(sums_of_three_layers(), MOES)
  first = {
    'drop_rate': 2 / 16,
    'load_cv': 8**-0.5,  # mean 16 / 3, variance (16 / 3)^2 / 8
    'load_max_over_mean': 1.5,
    'unused_experts': 0,
    'entropy': 0.5,
    'router_logit_rms': 1.5,
    'drop_rate_choice_1': 0.0,
    'unsent_rate_choice_1': 0.0,
    'drop_rate_choice_2': 2 / 8,
    'unsent_rate_choice_2': 1 / 8,
    # The share is one of the 13 choices that are served.
    'away_share': 0.5,
    'sent_share': 0.2,
    'shadowed_experts': 1.5,
    'exchange_overflow': 0.1,
    'balance_loss': 1.5,
    'z_loss': 0.5,
    'importance_loss': 0.0,
    'load_loss': 0.0,
    'sequence_balance_loss': 0.25,
    'load': [0.5, 0.25, 0.25],
    'kept_load': [0.3125, 0.25, 0.25],
  }
  layers = {
    key.removeprefix('layer_1/'): value
    for key, value in row.items()
    if key.startswith('layer_1/')
  }
  assert layers.keys() == first.keys()
  for name, value in first.items():
    np.testing.assert_allclose(layers[name], value, rtol=1e-6, err_msg=name)
  assert row['layer_2/kept_load'] == [0.25, 0.25, 0.125, 0]
  assert row['layer_2/drop_rate'] == 6 / 16
  # The loss is per weight, and the drop rate the mean of sparse layers.
  assert (row['loss'], row['drop_rate']) == (4.0, 0.25)
  assert not [key for key in row if key.startswith('layer_0/')]
  # A metric is left out where nothing happened.
  assert not {'layer_2/sent_share', 'layer_2/sequence_balance_loss'} & {*row}


def test_a_layer_of_fewer_choices_than_others_has_its_own_rates():
  # An encoder's layer of K = 1 stands beside a decoder's of K = 2.
  aux = numpy_aux(
    dict(
      tokens=8.0, load=np.array([6.0, 2, 0, 0]),
      kept_load=np.array([4.0, 2, 0, 0]), overflowed=np.array([2.0, 0]),
    ),
  )  # fmt: skip
  aux = jax.tree.map(lambda leaf: np.asarray(leaf)[None], aux)
  sums = LossSums(20.0, 5.0, 0.0, aux)
  row = summary.layer_summary(sums, 0, (MoeOptions(4, 1),))
  assert row['drop_rate'] == 2 / 8 and 'drop_rate_choice_1' not in row
  assert row['load'] == [0.75, 0.25, 0, 0]


def test_a_router_that_names_an_expert_that_is_not_there_is_refused():
  index = jnp.array([[[0], [99], [3], [2], [1]]])
  chosen = routing.even_choice(
    index, num_experts=4, capacity=5, mask=jnp.ones((1, 5), bool)
  )
  stats = routing.routing_stats(chosen, None, jnp.ones((1, 5), bool))
  aux = empty_aux(4, 1)._replace(stats=stats)
  sums = LossSums(20.0, 5.0, 0.0, jax.tree.map(lambda leaf: leaf[None], aux))
  moes = (MoeOptions(4, 1, router=own_kinds.InTurn()),)
  message = "4 of the 5 choices.*'tests.own_kinds:InTurn'.*experts 0 to 3"
  with pytest.raises(InputError, match=message):
    summary.summarize(summary.host(sums), moes)
