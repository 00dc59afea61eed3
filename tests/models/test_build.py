"""Models built from options: their layers, parameters, sizes and halves."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import models
from moe_jax.layers.experts import FeedForwardExpert
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.positions import Learned
from moe_jax.layers.routers import ExpertChoice, Hash
from moe_jax.layers.shared import Numerics
from moe_jax.models.encoder_decoder import EncoderOptions
from tests.models import tiny


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


def test_a_caller_may_change_the_shapes_that_it_gets():
  model = tiny.build()
  shapes = models.abstract_params(model)
  names = set(shapes)
  shapes.clear()
  assert set(models.abstract_params(model)) == names != set()


class Table(models.Model):
  """A user's model whose field, an array, has no hash."""

  table: np.ndarray

  def inputs(self, batch):
    return {'tokens': batch['tokens']}

  @nn.compact
  def __call__(self, tokens):
    return nn.Dense(5)(jnp.asarray(self.table)[tokens])


def test_a_model_without_a_hash_has_shapes_too():
  model = Table(np.ones((4, 7), np.float32))
  with pytest.raises(TypeError):
    hash(model)
  shapes = models.abstract_params(model)
  assert shapes['Dense_0']['kernel'].shape == (7, 5)


def test_fewer_kv_heads_and_a_window_are_the_decoders_alone():
  attention = dict(num_kv_heads=2, window=4)
  own = {'attention': {'num_heads': 2}, 'ffn': {'hidden': 14}}
  model = tiny.build(
    kind='encoder_decoder', attention=attention, encoder=EncoderOptions(0, own)
  )
  blocks = [stack.block for stack in model.stacks.blocks]
  encoder, decoder = (block.attention for block in blocks)
  assert [block.ffn.hidden for block in blocks] == [14, 20]
  assert [block.cross for block in blocks] == [False, True]
  assert (encoder.num_heads, decoder.num_heads) == (2, 4)
  assert (encoder.num_kv_heads, encoder.window) == (2, 0)
  assert (decoder.num_kv_heads, decoder.window) == (2, 4)


def test_embedded_tokens_of_an_encoder_have_its_dropout():
  encoder = EncoderOptions(0, {'dropout': 0.5})
  model = tiny.build(kind='encoder_decoder', encoder=encoder)
  tokens, mask = jnp.asarray(tiny.tokens()), jnp.ones((tiny.B, tiny.T), bool)

  def share_of_zeros(params, is_encoder):
    bound = model.bind({'params': params}, rngs={'dropout': tiny.key(0)})
    x = bound.embeddings.embed(tokens, mask, tokens, True, is_encoder)
    return (x == 0).mean()

  params = {'embedding': jnp.ones((tiny.V, 12))}
  assert 0.4 < share_of_zeros(params, True) < 0.6
  assert share_of_zeros(params, False) == 0


def test_a_half_becomes_the_overrides_that_make_it():
  base = tiny.options(kind='encoder_decoder')
  half = dataclasses.replace(
    base.encoder_half,
    num_layers=3,
    ffn=FfnOptions(14),
    moe=dataclasses.replace(base.moe, router=ExpertChoice(jitter=0.1)),
  )
  options = base.with_halves(half, *base.halves[1:])
  assert options.encoder_half == half
  assert options.encoder.num_layers == 3
  assert options.encoder.overrides == {
    'ffn': {'hidden': 14},
    'moe': {
      'router': {'kind': 'expert_choice', 'expert_choice': {'jitter': 0.1}}
    },
  }
  small = options.shrunk()
  assert small.encoder_half.num_layers == 2
  assert small.encoder.overrides['moe'] == options.encoder.overrides['moe']
  assert 'ffn' not in small.encoder.overrides
