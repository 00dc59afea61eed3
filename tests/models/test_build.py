"""Models built from options, and options refused before any array exists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models, run_config
from moe_jax.config import OptionError, merge, read_options, section_of
from moe_jax.configs import base
from moe_jax.layers.experts import Dropless, FeedForwardExpert
from moe_jax.layers.parameters import Role
from moe_jax.layers.positions import Learned
from moe_jax.layers.routers import ExpertChoice, Hash, TokenChoice
from moe_jax.layers.shared import Numerics
from moe_jax.models import sparse_pattern
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.models.stack import Padding
from moe_jax.parallel.ragged import RaggedExchange
from moe_jax.routing.capacity import All
from tests.models import tiny

ROLES = {
  'attention', 'embedding', 'expert', 'ffn', 'gate', 'head', 'lstm', 'norm',
  'router', 'shared_expert',
}  # fmt: skip
FORMS = {'bias', 'kernel', 'scale', 'table'}


@pytest.mark.parametrize(
  ('layers', 'num_layers', 'expected'),
  [
    ('all', 3, [1, 1, 1]),
    ('none', 3, [0, 0, 0]),
    ('every 1', 2, [1, 1]),
    ('every 2', 4, [0, 1, 0, 1]),
    ('every 2', 5, [0, 1, 0, 1, 0]),
    ('every 3', 7, [0, 0, 1, 0, 0, 1, 0]),
    ('last 1', 4, [0, 0, 0, 1]),
    ('last 3', 4, [0, 1, 1, 1]),
    ('1,3', 5, [0, 1, 0, 1, 0]),
    ('3, 0', 4, [1, 0, 0, 1]),
    ('2', 3, [0, 0, 1]),
  ],
)
def test_sparse_pattern_by_hand(layers, num_layers, expected):
  assert sparse_pattern(layers, num_layers) == tuple(map(bool, expected))


@pytest.mark.parametrize(
  ('layers', 'message'),
  [
    ('every 5', "moe.layers='every 5' with num_layers=4"),
    ('last 5', "moe.layers='last 5' with num_layers=4"),
    ('4', r"moe.layers='4' not in \[0, num_layers=4\)"),
    ('1,7', r'not in \[0, num_layers=4\)'),
    ('every 0', "none of 'all', 'none', 'every N', 'last N'"),
    ('every', 'none of'),
    ('some', 'none of'),
    ('', 'none of'),
    ('-1', 'none of'),
    ('1,', 'none of'),
  ],
)
def test_patterns_that_mean_nothing_are_refused(layers, message):
  with pytest.raises(ValueError, match=message):
    sparse_pattern(layers, 4)


SIZES = {
  'vocab_size': tiny.V,
  'num_layers': 2,
  'width': 12,
  'attention': {'num_heads': 4, 'head_width': 6},
  'ffn': {'hidden': 20},
  'moe': {
    'num_experts': 5,
    'num_selected': 2,
    'layers': 'all',
    'router': {'token_choice': {'gates': 'renormalized'}},
  },
}


def read(*layers, kind='decoder'):
  """Reads the options of a section: the sizes above and the given layers."""
  config = section_of(models.DecoderOptions(), models.MODELS)
  sizes = SIZES if kind == 'decoder' else {'vocab_size': tiny.V}
  for layer in (sizes, {'kind': kind}, *layers):
    config = merge(config, layer)
  return read_options(models.MODELS, config)


REFUSED = {
  "unknown model 'encoder'": dict(kind='encoder'),
  "unknown numerics.dtype 'float16'": {'numerics': {'dtype': 'float16'}},
  "unknown numerics.param_dtype 'int8'": {'numerics': {'param_dtype': 'int8'}},
  "unknown ffn.activation 'geglo'; did you mean 'geglu'": {
    'ffn': {'activation': 'geglo'}
  },
  "unknown norm 'batchnorm'": {'norm': {'kind': 'batchnorm'}},
  "unknown positions 'rotery'; did you mean 'rotary'": {
    'positions': {'kind': 'rotery'}
  },
  "unknown remat 'all'": dict(remat='all'),
  "unknown initialisation 'xavier'": {'numerics': {'init': {'kind': 'xavier'}}},
  'vocab_size=-1 must be at least 0': dict(vocab_size=-1),
  'num_layers=0 must be at least 1': dict(num_layers=0),
  'attention.num_heads=5 does not divide width=12': {
    'attention': {'num_heads': 5, 'head_width': 0}
  },
  'num_heads=0 must be at least 1': {'attention': {'num_heads': 0}},
  'num_kv_heads=3 does not divide num_heads=4': {
    'attention': {'num_kv_heads': 3}
  },
  'head_width=5 must be even under rotary': {'attention': {'head_width': 5}},
  'width=0 must be at least 1': dict(width=0),
  'ffn.hidden=0 must be at least 1': {'ffn': {'hidden': 0}},
  r'dropout=1.5 not in \[0, 1\)': dict(dropout=1.5),
  'max_len=-3 must be at least 0': {
    'positions': {'kind': 'learned', 'learned': {'max_len': -3}}
  },
  "lstm.hidden=7 has no effect with kind='decoder'": {'lstm': {'hidden': 7}},
}


@pytest.mark.parametrize('message', REFUSED)
def test_bad_models_are_refused(message):
  with pytest.raises(ValueError, match=message):
    read(REFUSED[message])


def test_options_of_another_kind_are_refused():
  read({'lstm': {'hidden': 7}, 'positions': {'kind': 'none'}}, kind='lstm')
  for section in (
    {'attention': {'num_heads': 3}},
    {'remat': 'full'},
    {'norm': {'epsilon': 1e-3}},
  ):
    with pytest.raises(ValueError, match="has no effect with kind='lstm'"):
      read(section, kind='lstm')


REFUSED_MOE = {
  'num_experts=-1 must be at least 0': dict(num_experts=-1),
  r'num_selected=6 not in \[1, num_experts=5\]': dict(num_selected=6),
  "num_selected=1 with gates='renormalized' makes": dict(num_selected=1),
  "unknown router 'tokens'": {'router': {'kind': 'tokens'}},
  "unknown capacity 'per'": {'capacity': {'kind': 'per'}},
  "unknown dispatch 'scatter'": {'dispatch': {'kind': 'scatter'}},
  'group_size=-8': dict(group_size=-8),
  "none of 'all'": dict(layers='odd'),
  "moe.layers='every 5' with num_layers=2": dict(layers='every 5'),
}


@pytest.mark.parametrize('message', REFUSED_MOE)
def test_bad_sparse_layers_are_refused(message):
  with pytest.raises(ValueError, match=message):
    read({'moe': REFUSED_MOE[message]})


@pytest.mark.parametrize('kind', ['decoder', 'encoder_decoder', 'lstm'])
def test_wrong_sparse_layers_hide_no_other_problem(kind):
  model = {'kind': kind, 'moe': {'layers': 'every 5'}}
  flags = {'model': model, 'optimizer': {'epsilon': -1.0}}
  with pytest.raises(OptionError) as error:
    run_config.read(merge(base.get_config(), flags))
  problems = error.value.problems
  assert "model.moe.layers='every 5' with num_layers=4" in problems
  assert any(text.startswith('optimizer.epsilon=-1.0') for text in problems)


LEAKS = [
  dict(router=TokenChoice(gates='renormalized', slot_priority='choice_major')),
  dict(
    router=TokenChoice(gates='renormalized', slot_priority='batch_priority')
  ),
  dict(router=TokenChoice(slot_priority='batch_priority'), num_selected=1),
]


@pytest.mark.parametrize('moe', LEAKS)
def test_a_router_that_leaks_the_future_needs_its_flag(moe):
  with pytest.raises(ValueError, match='allow_future_leak=True'):
    tiny.build(moe=moe)
  model = tiny.build(moe={**moe, 'allow_future_leak': True})
  assert model.stacks.leaks_future and model.stacks.moe.router == moe['router']
  # With unlimited capacity no choice can be evicted; dense models have no
  # choices.
  roomy_model = tiny.build(moe={**moe, 'capacity': All()})
  assert not roomy_model.stacks.leaks_future
  tiny.build(moe={**moe, 'layers': 'none'})


def test_a_leak_is_said_once_with_what_to_do():
  queue = TokenChoice(slot_priority='batch_priority')
  dropless = Dropless(exchange=RaggedExchange(capacity_fraction=0.5))
  for moe, reason in (
    (dict(router=ExpertChoice()), 'an expert chooses among all tokens'),
    (dict(router=queue), "slot_priority='batch_priority' with num_selected=2"),
    (
      dict(capacity=All(), dispatch=dropless),
      "the dispatch's exchange.capacity_fraction=0.5 drops the rows",
    ),
  ):
    with pytest.raises(OptionError) as error:
      tiny.build(moe)
    (text,) = error.value.problems
    assert text.startswith(f'moe: {reason}')
    assert text.count('change earlier outputs') == text.count('; use ') == 1


def test_experts_that_choose_leak_in_a_decoder_alone():
  moe = dict(router=ExpertChoice())
  with pytest.raises(ValueError, match=r'later tokens.*allow_future_leak=True'):
    tiny.build(moe=moe)
  tiny.build(moe=moe | dict(allow_future_leak=True))
  tiny.build(moe=moe | dict(capacity=All()))
  encoder = EncoderOptions(2, {'moe': {'layers': '1'}})
  kind_options = dict(kind='encoder_decoder', encoder=encoder)
  model = tiny.build(moe | dict(layers='none'), **kind_options)
  assert (
    not model.stacks.leaks_future and model.stacks.moe.router == ExpertChoice()
  )
  with pytest.raises(ValueError, match='allow_future_leak=True'):
    tiny.build(moe | dict(layers='1'), **kind_options)


def test_the_two_halves_hash_by_tables_of_their_own():
  moe = dict(router=Hash(of='position', seed=5), num_selected=3)
  model = tiny.build(moe=moe, kind='encoder_decoder')
  routers = [stack.experts.router for stack in model.stacks.blocks]
  assert routers == [Hash(of='position', seed=6), Hash(of='position', seed=5)]


def test_zero_means_what_the_config_says_it_means():
  model = tiny.build(width=16, attention=dict(head_width=0))
  block = model.blocks.block
  assert block.attention.head_width == 16 // 4
  assert block.attention.num_kv_heads == 4
  assert model.stacks.moe.expert.hidden == block.ffn.hidden == 20
  learned = tiny.options(positions=Learned())
  assert learned.positions == Learned(tiny.T)
  with pytest.raises(ValueError, match="max_len=0 stands for the data's"):
    dataclasses.replace(learned, positions=Learned()).build()
  with pytest.raises(ValueError, match='vocab_size=0: 0 stands for the token'):
    dataclasses.replace(learned, vocab_size=0).build()
  with pytest.raises(ValueError, match="smaller than the tokenizer's 24"):
    learned.filled(24, tiny.T)
  relu_model = tiny.build(moe=dict(expert=FeedForwardExpert(7, 'relu')))
  expert, ffn = relu_model.stacks.moe.expert, relu_model.blocks.block.ffn
  assert (expert.hidden, expert.activation) == (7, 'relu')
  assert (ffn.hidden, ffn.activation) == (20, 'gelu')


def test_expert_dropout_is_apart_from_dropout():
  for rate, expected in ((-1.0, 0.1), (0.4, 0.4), (0.0, 0.0)):
    expert = FeedForwardExpert(dropout=rate)
    model = tiny.build(dropout=0.1, moe=dict(expert=expert))
    assert model.stacks.moe.expert.dropout == expected
    assert model.blocks.block.dropout == 0.1


def test_the_dense_twin_is_k_experts_wide_at_sparse_places():
  twin = tiny.build(
    moe=dict(
      num_experts=0,
      layers='every 2',
      expert=FeedForwardExpert(7, 'relu'),
      extra_ffn=True,
    ),
    ffn=dict(activation='swiglu'),
  )
  shapes = tiny.leaves(models.describe(twin).shapes)
  width = {
    name.removesuffix('/w_in'): leaf.shape[-1]
    for name, leaf in shapes.items()
    if 'w_in' in name
  }
  assert width == {
    'layers/layer_0/ffn': 20,
    'layers/layer_1/ffn': 2 * 7,
    'layers/layer_1/extra_ffn': 20,
  }
  gated = {name.split('/')[1] for name in shapes if '/ffn/w_gate' in name}
  assert gated == {'layer_0'}  # the experts' activation has no gate
  assert not any('router' in name for name in shapes)
  assert twin.stacks.moe is None and twin.stacks.moes == (None, None)
  assert not twin.stacks.loss_weights() and not twin.stacks.keeps_router_state


@pytest.mark.parametrize('kind', models.MODELS.builtin)
def test_every_parameter_has_a_role_a_form_and_its_axes(kind):
  trees = models.describe(tiny.build(kind=kind))
  roles = jax.tree.leaves(trees.roles, is_leaf=lambda x: isinstance(x, Role))
  shapes = jax.tree.leaves(trees.shapes)
  axes = jax.tree.leaves(trees.axes, is_leaf=lambda x: isinstance(x, tuple))
  assert len(roles) == len(shapes) == len(axes)
  for role, leaf, names in zip(roles, shapes, axes):
    assert role.role in ROLES and role.form in FORMS
    assert len(names) == leaf.ndim


def test_the_groups_of_a_run_fit_its_batches():
  run = models.RunShape(total_steps=9, rows=6, microbatches=2, seq_len=10)

  def problems(group_size, kind='decoder', **changes):
    moe = dict(group_size=group_size)
    options = tiny.options(moe, kind)
    return [*options.problems_in(run._replace(**changes))]

  assert not problems(0) and not problems(20) and not problems(5)
  (problem,) = problems(40)
  assert 'model.moe.group_size=40 does not divide the 60 tokens' in problem
  # With the whole batch as one group, accumulation would change the groups.
  (problem,) = problems(-1)
  assert 'model.moe.group_size=-1 with microbatches=2' in problem
  assert not problems(-1, microbatches=1)
  (problem,) = problems(20, parts=2)
  assert 'the 3 groups of 20 tokens' in problem
  (problem,) = problems(20, 'encoder_decoder', target_len=5)
  assert 'data.target_len=5' in problem
  assert not problems(10, 'encoder_decoder', target_len=5)


def test_routers_count_what_they_see():
  model = tiny.build(kind='encoder_decoder', encoder=EncoderOptions(3))
  batch = {
    'segment_ids': jnp.array([[1, 1, 2, 0]]),
    'encoder_segment_ids': jnp.array([[1, 0, 0, 0, 0]]),
  }
  counts = model.stacks.routed_tokens(batch)
  np.testing.assert_array_equal(counts, [1, 1, 1, 3, 3])
  empty = {name: jnp.zeros_like(ids) for name, ids in batch.items()}
  np.testing.assert_array_equal(model.stacks.routed_tokens(empty), np.ones(5))


def test_a_batch_is_what_a_model_takes():
  pair_model = tiny.build(kind='encoder_decoder')
  shapes = pair_model.batch_shapes(2, 7, 5)
  assert shapes['encoder_tokens'].shape == (2, 7)
  assert shapes['targets'].shape == shapes['loss_weights'].shape == (2, 5)
  batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
  assert {*batch} - {*pair_model.inputs(batch)} == {'targets', 'loss_weights'}
  decoder_shapes = tiny.build().batch_shapes(2, 7)
  assert (
    decoder_shapes['tokens'].shape == decoder_shapes['targets'].shape == (2, 7)
  )


def test_layers_are_taken_out_of_a_models_trees():
  encoder = EncoderOptions(3)
  model = tiny.build(
    dict(layers='every 2'), 'encoder_decoder', num_layers=4, encoder=encoder
  )
  params = tiny.params_of(model)
  layers = model.stacks.layer_trees(params)
  assert len(layers) == model.stacks.num_layers == 7
  sparse = tuple(i for i, layer in enumerate(layers) if 'moe' in layer)
  assert sparse == model.stacks.sparse_layers == (1, 4, 6)
  scales = params['decoder']['layers']['layer_1']['ffn_norm']['scale']
  np.testing.assert_array_equal(layers[6]['ffn_norm']['scale'], scales[1])
  location = model.stacks.place_of(
    ('decoder', 'layers', 'layer_1', 'moe', 'router', 'w')
  )
  assert location == (('decoder',), ('moe', 'router', 'w'), (1, 3), (4, 6))
  assert model.stacks.place_of(('embedding',)) is None


def test_shrunk_models_keep_their_structure():
  big = tiny.options(
    dict(layers='every 3', num_experts=64, group_size=256),
    num_layers=24,
    width=768,
    attention=dict(num_heads=12, num_kv_heads=4, head_width=64, window=512),
    ffn=dict(hidden=3072),
    positions=Learned(512),
    numerics=Numerics(dtype='bfloat16'),
  )
  small = big.shrunk()
  assert (small.vocab_size, small.num_layers, small.width) == (0, 3, 32)
  assert small.attention == dataclasses.replace(
    big.attention, num_heads=4, num_kv_heads=2, head_width=16, window=8
  )
  assert small.ffn.hidden == 48 and small.positions == Learned(0)
  assert (small.moe.num_experts, small.moe.group_size) == (4, 64)
  assert small.numerics == Numerics()


class Routed(Padding):
  """Padding that routers see, as a user's own class could have it."""

  def context(self, context):
    mask = jnp.ones_like(context.token_mask)
    return context._replace(routed_mask=mask)

  def routed(self, segment_ids):
    return jnp.ones_like(segment_ids, bool)


def test_the_normaliser_of_router_losses_is_what_routers_counted():
  model = tiny.build()
  blocks = dataclasses.replace(model.blocks, padding=Routed())
  model = model.with_stacks(blocks)
  tokens, segments = tiny.tokens(), np.ones((tiny.B, tiny.T), np.int32)
  segments[0, 4:] = segments[2] = 0
  _, aux = tiny.apply(model)(tiny.params_of(model), tokens, segments)
  counts = model.stacks.routed_tokens({'segment_ids': jnp.asarray(segments)})
  np.testing.assert_array_equal(counts, aux.stats.tokens)
  assert counts[0] == tiny.B * tiny.T
