"""What `build` makes of a config, and what it refuses before any array."""

import pytest

from moe_jax import models
from moe_jax.models import sparse_pattern
from tests.models import tiny


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


REFUSED = {
  "unknown model.kind 'encoder'": dict(kind='encoder'),
  "unknown model.dtype 'float16'": dict(dtype='float16'),
  "unknown model.param_dtype 'int8'": dict(param_dtype='int8'),
  "unknown activation 'geglo'; did you mean 'geglu'": dict(activation='geglo'),
  "unknown norm 'batchnorm'": dict(norm='batchnorm'),
  "unknown positions 'rotery'; did you mean 'rotary'": dict(positions='rotery'),
  "unknown remat 'all'": dict(remat='all'),
  "unknown init.kind 'xavier'": dict(init={'kind': 'xavier'}),
  'vocab_size=0: 0 stands for the tokenizer': dict(vocab_size=0),
  'vocab_size=-1': dict(vocab_size=-1),
  'num_layers=0 must be at least 1': dict(num_layers=0),
  'num_heads=5 does not divide width=12': dict(num_heads=5, head_width=0),
  'num_heads=0': dict(num_heads=0, head_width=0),
  'num_kv_heads=3 does not divide num_heads=4': dict(num_kv_heads=3),
  'rotary needs an even head_width=5': dict(head_width=5),
  'width=0': dict(width=0),
  'hidden=0 must be at least 1': dict(hidden=0),
  r'dropout=1.5 not in \[0, 1\)': dict(dropout=1.5),
  'max_len=-3': dict(positions='learned', max_len=-3),
}


@pytest.mark.parametrize('message', REFUSED)
def test_bad_models_are_refused(message):
  with pytest.raises(ValueError, match=message):
    tiny.build(**REFUSED[message])


REFUSED_MOE = {
  r'num_selected=2 not in \[1, num_experts=-1\]': dict(num_experts=-1),
  r'num_selected=6 not in \[1, num_experts=5\]': dict(num_selected=6),
  'with num_selected=1 makes every gate 1': dict(num_selected=1),
  "unknown router 'tokens'": dict(router='tokens'),
  "unknown gates 'row'; did you mean 'raw'": dict(gates='row'),
  "unknown second_policy 'none'": dict(second_policy='none'),
  "unknown slot_priority 'token_maj'": dict(slot_priority='token_maj'),
  "unknown capacity_rule 'per'": dict(capacity_rule='per'),
  "unknown capacity_rounding 'up'": dict(capacity_rounding='up'),
  "capacity_rule='fixed' needs slots=0": dict(capacity_rule='fixed'),
  'capacity_factor=0.0 must be positive': dict(capacity_factor=0.0),
  "unknown dispatch 'scatter'": dict(dispatch='scatter'),
  "unknown balance_choices 'last'": dict(balance_choices='last'),
  'group_size=-8': dict(group_size=-8),
  "unknown activation 'rely'; did you mean 'relu'": dict(activation='rely'),
  "none of 'all'": dict(layers='odd'),
  r'jitter=1.0 not in \[0, 1\)': dict(jitter=1.0),
  r'dropout=1.0 not in \[0, 1\)': dict(expert_dropout=1.0),
}


@pytest.mark.parametrize('message', REFUSED_MOE)
def test_bad_sparse_layers_are_refused(message):
  with pytest.raises(ValueError, match=message):
    tiny.build(moe=REFUSED_MOE[message])


LEAKS = [
  dict(slot_priority='choice_major'),
  dict(slot_priority='batch_priority'),
  dict(slot_priority='batch_priority', num_selected=1, gates='raw'),
]


@pytest.mark.parametrize('moe', LEAKS)
def test_a_router_that_leaks_the_future_needs_its_flag(moe):
  with pytest.raises(ValueError, match='allow_future_leak=True'):
    tiny.build(moe=moe)
  built = tiny.build(moe={**moe, 'allow_future_leak': True})
  priority = built.config.stack.block.moe.router.slot_priority
  assert priority == moe['slot_priority']
  # Where every token has room nothing can be evicted; dense models have none.
  tiny.build(moe={**moe, 'capacity_rule': 'all'})
  tiny.build(moe={**moe, 'num_experts': 0})


def test_experts_that_choose_leak_in_a_decoder_alone():
  moe = dict(router='expert_choice', gates='raw')
  with pytest.raises(ValueError, match=r'later tokens.*allow_future_leak=True'):
    tiny.build(moe=moe)
  tiny.build(moe=moe | dict(allow_future_leak=True))
  tiny.build(moe=moe | dict(capacity_rule='all'))
  of_an_encoder = moe | dict(layers='none', encoder_layers='1')
  both = dict(kind='encoder_decoder', num_encoder_layers=2)
  config = tiny.config(of_an_encoder, **both)
  assert not models.leaks_future(config.model.moe)
  built = models.build(config).config
  assert built.moe.router.kind == 'expert_choice'
  with pytest.raises(ValueError, match='allow_future_leak=True'):
    tiny.build(of_an_encoder | dict(layers='1'), **both)


def test_the_two_halves_hash_by_tables_of_their_own():
  moe = dict(router='hash', router_seed=5, hash_of='position', num_selected=3)
  config = tiny.build(moe=moe, kind='encoder_decoder').config
  routers = [stack.block.moe.router for _, stack in config.stacks]
  assert [r.seed for r in routers] == [6, 5]
  assert {r.hash_of for r in routers} == {'position'}


def test_zero_means_what_the_config_says_it_means():
  block = tiny.build(width=16, head_width=0).config.stack.block
  assert block.attention.head_width == 16 // 4
  assert block.attention.num_kv_heads == 4
  assert block.moe.expert.hidden == block.ffn.hidden == 20
  assert tiny.build(positions='learned').config.embedding.max_len == tiny.T
  other = tiny.build(moe=dict(hidden=7, activation='relu')).config.stack.block
  assert (other.moe.expert.hidden, other.moe.expert.activation) == (7, 'relu')
  assert (other.ffn.hidden, other.ffn.activation) == (20, 'gelu')


def test_expert_dropout_is_apart_from_dropout():
  same = tiny.build(dropout=0.1).config.stack.block
  assert same.moe.expert.dropout == same.ffn.dropout == same.dropout == 0.1
  apart = tiny.build(
    dropout=0.1, moe=dict(expert_dropout=0.4)
  ).config.stack.block
  assert apart.moe.expert.dropout == 0.4
  assert apart.ffn.dropout == apart.attention.dropout == apart.dropout == 0.1
  none = tiny.build(
    dropout=0.1, moe=dict(expert_dropout=0.0)
  ).config.stack.block
  assert none.moe.expert.dropout == 0.0


def test_the_dense_twin_is_k_experts_wide_at_sparse_places():
  twin = tiny.build(
    moe=dict(
      num_experts=0,
      layers='every 2',
      hidden=7,
      activation='relu',
      extra_ffn=True,
    ),
    activation='swiglu',
  )
  shapes = tiny.leaves(models.abstract_params(twin, tiny.T))
  width = {
    name.removesuffix('/w_in/value'): leaf.shape[-1]
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
