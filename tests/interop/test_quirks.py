"""Behaviour that only transformers has: by hand, and through a config."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.config import read_options, section_of
from moe_jax.interop.quirks import (
  EvenSlots,
  RoutedPadding,
  ServedByRank,
  TransformersEncoderDecoder,
  by_rank,
)
from moe_jax.layers import FeedForwardExpert, MoE, MoeOptions
from moe_jax.layers.block import Context
from moe_jax.layers.positions import Relative
from moe_jax.layers.retained import Retained
from moe_jax.models import MODELS
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.routing import token_choice
from moe_jax.routing.capacity import All, Fixed
from moe_jax.runs.workdir import check_allowed, classes_in
from tests.models import tiny
from tests.training import tiny as tiny_runs

B, T, E, M, F = 3, 4, 5, 6, 11


def draw(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def make(capacity=All(), **options):
  expert = FeedForwardExpert(F, 'relu')
  return MoE(MoeOptions(E, capacity=capacity, expert=expert, **options))


@functools.cache
def params_of(layer):
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((B, T, M)))
  leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes)['params'])
  return tree.unflatten([draw(*x.shape, seed=i) for i, x in enumerate(leaves)])


def run(layer, x, mask=None):
  call = jax.jit(lambda p, x: layer.apply({'params': p}, x, mask))
  return call(params_of(layer), x)


@pytest.mark.parametrize(
  ('tokens', 'minimum', 'slots'),
  # With 32 experts, two choices a token and twice an even share, one has an
  # eighth of the tokens, rounded down, then up to an even number.
  [(48, 4, 6), (47, 4, 6), (40, 4, 6), (39, 4, 4), (8, 1, 2), (8, 3, 3),
   (3, 4, 3)],
)  # fmt: skip
def test_even_slots_by_hand(tokens, minimum, slots):
  capacity = EvenSlots(2.0, minimum)
  assert capacity.per_expert(tokens, 32, 2) == slots
  # 2 * 1.15 * 50 / 5 is 23, which would be 24, but floating point has less.
  assert EvenSlots(1.15).per_expert(50, 5, 2) == 22


def test_choices_are_served_by_their_rank():
  # Token 0 chooses experts 4 and 2, token 1 experts 2 and 4. Experts have one
  # slot, and token 1's first choice is served before token 0's second.
  logits = jnp.array([[[0, 0, 2.0, 0, 3], [0, 0, 4, 0, 2]]])
  options = dict(gates='renormalized', slot_priority='choice_major')
  choose = functools.partial(
    token_choice, num_selected=2, capacity=1, **options
  )
  routing = jax.jit(choose)(logits)
  np.testing.assert_array_equal(routing.kept, [[[1, 0], [1, 0]]])
  ranked = jax.jit(by_rank)(routing)
  np.testing.assert_array_equal(ranked.expert_index, [[[1, 0], [1, 0]]])
  np.testing.assert_array_equal(ranked.slot, [[[0, 0], [1, 1]]])
  np.testing.assert_array_equal(ranked.gate, routing.gate)
  np.testing.assert_array_equal(ranked.kept, routing.kept)
  assert ranked.capacity == 2


@pytest.mark.parametrize('takes', [False, True])
def test_padding_takes_slots_only_if_it_is_routed(takes):
  # All tokens are alike and choose one expert with two slots; the first token
  # of each row is padding.
  layer = make(Fixed(2))
  x = jnp.broadcast_to(draw(M)[None, None], (B, T, M))
  ids = jnp.broadcast_to((jnp.arange(T) > 0).astype(jnp.int32), (B, T))
  context = Context(ids, ids > 0, jnp.zeros((B, T), jnp.int32))
  if takes:
    context = RoutedPadding().context(context)
    # Padding attends to the row's text, and the text does not attend to it.
    np.testing.assert_array_equal(context.segment_ids, np.ones((B, T)))
    np.testing.assert_array_equal(context.key_segment_ids, ids)
  y, aux = run(layer, x, context.routed)
  served = np.abs(np.asarray(y)).max(-1) > 0
  np.testing.assert_array_equal(served[0], [takes, True, not takes, False])
  assert aux.stats.tokens == B * (T if takes else T - 1)


def model_options(**quirks):
  moe = dict(router=ServedByRank(), capacity=Fixed(3), allow_future_leak=True)
  parts = dict(positions=Relative(), embedding=dict(tie=False))
  plain = tiny.options(moe, 'encoder_decoder', **parts)
  return dataclasses.replace(TransformersEncoderDecoder.of(plain), **quirks)


@pytest.mark.slow
def test_router_losses_are_means_over_the_tokens_that_are_routed():
  model = model_options().build()
  halves = (tiny_runs.rows(3, 10, seed=i, vocab_size=tiny.V) for i in (0, 1))
  batch = {
    f'{prefix}{name}': values
    for prefix, rows in zip(model.stacks.sequences, halves, strict=True)
    for name, values in rows.items()
  }
  params = tiny.params_of(model)
  _, aux = jax.jit(model.apply)({'params': params}, **model.inputs(batch))
  counts = model.stacks.routed_tokens(batch)
  np.testing.assert_array_equal(counts, aux.stats.tokens)
  assert (counts < 30).all()
  padded_model = model_options(route_padding=True).build()
  padded_counts = padded_model.stacks.routed_tokens(batch)
  np.testing.assert_array_equal(padded_counts, [30] * len(counts))


def test_quirks_are_kinds_that_a_config_keeps():
  quirks = dict(route_padding=True, encoder_table=True)
  options = model_options(**quirks)
  config = section_of(options, MODELS)
  assert config.kind == 'moe_jax.interop.quirks:TransformersEncoderDecoder'
  assert config.custom.to_dict() == quirks
  section = json.loads(json.dumps(config.to_dict()))
  # Configs in a folder may name this class without permission, since it is
  # ours.
  check_allowed(classes_in(section), ())
  assert read_options(MODELS, section) == options


def test_what_a_quirk_does_not_go_with_is_refused():
  merged = Retained('', '0: 0 1 1 0 2')
  for message, make_options in {
    'ServedByRank cannot lead': lambda: MoeOptions(
      num_experts=5, router=ServedByRank(), num_selected=2, retained=merged
    ),
    'num_selected=3 of a router': lambda: MoeOptions(
      num_experts=5, router=ServedByRank(), num_selected=3
    ),
    'encoder_table=True has no effect': lambda: model_options(
      encoder_table=True, embedding=EmbeddingOptions(tie=True)
    ),
  }.items():
    with pytest.raises(ValueError, match=message):
      make_options()
