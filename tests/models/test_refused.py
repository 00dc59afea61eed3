"""Options that are silently wrong together are refused before any array.

What follows from one option's declaration is in `tests/bad_inputs`.
"""

import jax
import pytest

from moe_jax import models
from moe_jax.config import OptionError
from moe_jax.layers.experts import Dropless
from moe_jax.layers.positions import Learned, Relative
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import ExpertChoice, Hash, TokenChoice
from moe_jax.models import RunShape, sparse_pattern
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.parallel.ragged import RaggedExchange
from moe_jax.partitioning import ShardingOptions, make_mesh, tree_shardings
from moe_jax.routing.capacity import All
from tests.models import tiny

SEGMENTS = 'segment_ids', 'positions'
QUEUE = TokenChoice(slot_priority='batch_priority')


def retained(experts='', expert_of='', **moe):
  return lambda: tiny.options({'retained': Retained(experts, expert_of), **moe})


def halves(**overrides):
  encoder = EncoderOptions(0, overrides)
  return lambda: tiny.options(kind='encoder_decoder', encoder=encoder)


def lstm(positions=models.lstm_lm.NoPositions(), **moe):
  return lambda: tiny.options(
    {'layers': '1', **moe}, kind='lstm', positions=positions
  )


def half_a_batch():
  """Gives segments to the encoder alone."""
  model = tiny.build(kind='encoder_decoder')
  names = ('tokens', *(f'encoder_{n}' for n in ('tokens', *SEGMENTS)))
  inputs = {name: tiny.tokens() for name in names}
  params = tiny.params_of(model)
  jax.eval_shape(lambda: model.apply({'params': params}, **inputs))


REFUSED = {
  r"moe.layers='4' not in \[0, num_layers=2\)": lambda: tiny.options(
    dict(layers='4')
  ),
  "none of 'all', 'none', 'every N'": lambda: sparse_pattern('every 0', 4),
  r"attention.full_layers='5' not in \[0": lambda: tiny.options(
    attention=dict(window=3, full_layers='5')
  ),
  'given together or not at all': half_a_batch,
  # Experts of some layers are lost, or columns lead to the same expert.
  'layer 1 comes twice': retained('1:4, 1:3'),
  r'layer 1: num_selected=2 not in \[1, num_experts=1\]': retained('1:1'),
  'layer 1 has 4 columns, not num_experts=5': retained('', '1: 0 1 0 1'),
  r'no column leads to \[2\]': retained('', '1: 0 1 3 3 0'),
  'does not say by which column': retained(
    '', '1: 0 1 1 0 0', force_balance='random'
  ),
  r'names layers \[7\], which are not among': retained('7:3'),
  'columns of Hash cannot lead to merged': retained(
    '', '1: 0 1 1 0 0', router=Hash()
  ),
  # Overrides of an encoder.
  "encoder.overrides: unknown config key 'ffm'": halves(ffm=1),
  "encoder.overrides: unknown config key 'width'": halves(width=16),
  "moe.layer_reduce='mean', and 'sum' in the decoder": halves(
    moe={'layer_reduce': 'mean'}
  ),
  "moe.replay='trace', and '' in the decoder": halves(moe={'replay': 'trace'}),
  'attention.window=3 has no effect in an encoder': halves(
    attention={'window': 3}
  ),
  # A model of LSTMs.
  'knows neither routers that hash': lstm(router=Hash()),
  'nor those that keep a state': lstm(
    router=TokenChoice(gates='sigmoid', balance_bias_rate=0.1)
  ),
  "'relative' has no effect in a model": lstm(Relative()),
  r'moe.extra_ffn=True has no effect': lstm(extra_ffn=True),
  'model of LSTMs have all num_experts': lstm(retained=Retained('1:3')),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_is_refused(message):
  with pytest.raises(ValueError, match=message):
    REFUSED[message]()


LEAKS = {
  'an expert chooses among all tokens': dict(router=ExpertChoice()),
  "slot_priority='batch_priority' with num_selected=2": dict(router=QUEUE),
  "slot_priority='choice_major' with num_selected=2": dict(
    router=TokenChoice(slot_priority='choice_major')
  ),
  "the dispatch's exchange.capacity_fraction=0.5 drops the rows": dict(
    capacity=All(),
    dispatch=Dropless(exchange=RaggedExchange(capacity_fraction=0.5)),
  ),
}


@pytest.mark.parametrize('reason', LEAKS)
def test_a_decoder_that_leaks_the_future_needs_its_flag(reason):
  moe, halves = LEAKS[reason], dict(kind='encoder_decoder')
  with pytest.raises(OptionError) as error:
    tiny.build(moe)
  (text,) = error.value.problems
  assert text.startswith(f'moe: {reason}')
  assert text.count('change earlier outputs') == text.count('; use ') == 1
  assert tiny.build(moe | dict(allow_future_leak=True)).stacks.leaks_future
  # Dense layers have no choices, and with room for all none is evicted.
  tiny.build(moe | dict(layers='none'))
  if 'capacity' not in moe:
    assert not tiny.build(moe | dict(capacity=All())).stacks.leaks_future
  # An encoder sees all tokens anyway.
  encoder = EncoderOptions(2, {'moe': {'layers': '1'}})
  model = tiny.build(moe | dict(layers='none'), encoder=encoder, **halves)
  assert not model.stacks.leaks_future
  assert model.stacks.moe.router == moe.get('router', model.stacks.moe.router)
  with pytest.raises(ValueError, match='allow_future_leak=True'):
    tiny.build(moe | dict(layers='1'), encoder=encoder, **halves)


def test_rows_longer_than_the_positions_are_refused_in_a_run():
  run = RunShape(total_steps=1, rows=3, microbatches=1, seq_len=10)
  [problem] = tiny.options(positions=Learned(8)).problems_in(run)
  assert 'data.seq_len=10 is more than the 8 positions' in problem


def test_what_remat_may_keep_is_named():
  with pytest.raises(ValueError, match=r"'zz'; have \['attention', 'hidden'"):
    tiny.build(remat='save=rows,zz')
  with pytest.raises(ValueError, match="unknown remat 'some'"):
    tiny.build(remat='some')


def test_experts_that_do_not_divide_are_refused_on_a_mesh():
  options = dict(num_experts=4, retained=Retained('1:3'))
  trees = models.describe(tiny.build(options))
  mesh = make_mesh({'expert': 2}, jax.devices()[:2])
  with pytest.raises(ValueError, match='expert=3 does not divide by 2 devices'):
    tree_shardings(mesh, ShardingOptions().rules, trees.axes, trees.shapes)
