"""Decoding step by step equals the whole sequence at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import generation, models
from moe_jax.layers.attention import LatentOptions
from moe_jax.layers.experts import Dropless, SharedExpertOptions, few_tokens
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.positions import (
  Learned,
  NoPositions,
  Relative,
  Rotary,
  Sinusoidal,
)
from moe_jax.layers.retained import Retained
from moe_jax.layers.rotary import LongRope, Yarn
from moe_jax.layers.routers import (
  ExpertChoice,
  Hash,
  Hierarchical,
  StrictlyBalanced,
  Task,
  TokenChoice,
)
from moe_jax.models import decoding, trees
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import All, Fixed, Fraction, PerToken
from tests.models import tiny
from tests.models.tiny import B

S, T = 7, 9
ALL = dict(capacity=All(), dispatch=Dropless())


def longrope(original_len):
  factors = (1.5, 2.0, 3.0), (4.0, 6.0, 9.0)
  return LongRope(*factors, original_len, factor=8.0, long_mscale=1.4)


CASES = {
  'gpt-oss': dict(
    attention=dict(num_kv_heads=2, window=3, full_layers='every 2', sinks=True),
    positions=Rotary(scaling=Yarn(factor=4.0, original_len=3)),
    num_layers=4,
    moe=ALL,
  ),
  # Prompts are expanded, single tokens meet the cache as it is.
  'deepseek': dict(
    attention=LatentOptions(
      4, query_rank=7, kv_rank=6, plain_width=2, rotary_width=4, value_width=2,
      window=4, sinks=True,
    ),
    positions=Rotary(interleaved=True),
    moe=dict(
      num_experts=6,
      router=TokenChoice(
        gates='sigmoid_renormalized', gate_scale=2.5, expert_groups=3,
        chosen_expert_groups=2, expert_group_score='two_best',
        balance_bias_rate=0.1,
      ),
      shared_expert=SharedExpertOptions(9, gated=True),
      **ALL,
    ),
  ),
  # The prompt of four tokens is long.
  'longrope with fewer experts': dict(
    positions=Rotary(scaling=longrope(3)),
    moe=dict(retained=Retained('0:4', '1: 0 1 1 2 1'), **ALL),
  ),
  'learned': dict(
    positions=Learned(), use_bias=True, norm=LayerNorm(),
    # These are too many experts to unroll.
    moe=dict(layers='last 1', num_experts=600, **ALL),
  ),
  # In inference a token is compared to thresholds, independently of others.
  'strictly balanced': dict(
    positions=Relative(),
    attention=dict(
      num_kv_heads=2, window=4, qk_norm='all', clip=1.5, biases='key, out',
      scale='fixed', fixed_scale=0.3,
    ),
    embedding=dict(multiplier=3.0, logits_divisor=2.0),
    residual_multiplier=0.4,
    moe=dict(router=StrictlyBalanced(), allow_future_leak=True, **ALL),
  ),
  'lstm': dict(
    kind='lstm', positions=NoPositions(), num_layers=3, lstm=dict(hidden=7),
    moe=dict(
      layers='1', num_experts=6, num_selected=4,
      router=Hierarchical(
        branching=3, branches_selected=2, noisy=True, gates='renormalized'
      ),
      **ALL,
    ),
  ),
  'bigram': dict(moe=dict(router=Hash(of='bigram'), **ALL)),
  'hashed, but chosen in the encoder': dict(
    kind='encoder_decoder',
    positions=Relative(),
    attention=dict(qk_norm='head', clip=1.5),
    encoder=EncoderOptions(3, {'moe': {'router': {'kind': 'expert_choice'}}}),
    moe=dict(router=Hash(of='bigram'), **ALL),
  ),
  'switch': dict(
    kind='encoder_decoder',
    positions=Relative(),
    encoder=EncoderOptions(0, {'moe': {'layers': '1'}}),
    moe=dict(num_selected=1, router=TokenChoice(), capacity=Fixed(2)),
  ),
}  # fmt: skip


@functools.cache
def model_and_variables(name):
  """A model and its variables, among which biases differ by expert."""
  model = tiny.build(**CASES[name])
  state = jax.tree.map(
    lambda x: jnp.broadcast_to(jnp.linspace(0.5, -0.5, x.shape[-1]), x.shape),
    trees.init_router_state(model),
  )
  return model, trees.variables(tiny.params_of(model), state)


def whole_logits(name, tokens, source, source_mask):
  """Logits of whole sequences; the decoder drops no token."""
  model, variables = model_and_variables(name)
  if name == 'switch':  # a step of one token cannot fill an expert
    encoder, decoder = model.stacks.blocks
    assert decoder.experts.capacity == Fixed(2)
    moe = CASES[name]['moe'] | ALL
    _, roomy = tiny.build(**(CASES[name] | dict(moe=moe))).stacks.blocks
    model = model.with_stacks(encoder, roomy)
  inputs = {'tokens': tokens}
  if source is not None:
    inputs |= {
      'encoder_tokens': source,
      'encoder_segment_ids': source_mask.astype(jnp.int32),
      'segment_ids': jnp.ones_like(tokens),
    }
  run = jax.jit(lambda v: model.apply(v, **inputs)[0])
  return np.asarray(run(variables))


# One of each kind of model is also compiled with all optimizations.
OPTIMIZED = ('gpt-oss', 'switch', 'lstm')


def marks(name):
  slow = [pytest.mark.slow] * (name != 'gpt-oss')
  return slow + [pytest.mark.as_users_compile] * (name in OPTIMIZED)


@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=marks(n)) for n in CASES]
)
def test_steps_equal_the_whole_sequence(name):
  tokens = jnp.asarray(tiny.tokens(1, (B, T)))
  source = source_mask = None
  model, variables = model_and_variables(name)
  model, variables = model.for_decoding(variables, batch_size=1)
  step = jax.jit(functools.partial(model.apply, method='decode'))
  if 'encoder' in CASES[name].get('kind', ''):
    source = jnp.asarray(tiny.tokens(2, (B, S)))
    source_mask = jnp.arange(S)[None] < jnp.array([[S], [4], [2]])
    encode = functools.partial(model.apply, max_len=T, method='encode')
    cache = jax.jit(encode)(variables, source, source_mask)
  else:
    cache = model.make_cache(B, T + 2)
  expected = whole_logits(name, tokens, source, source_mask)
  assert np.std(expected) > 0.1
  step_logits = []
  # Prompts have four tokens, and rows are padded at their start.
  if source is None:
    padding = jnp.zeros((B, 2), jnp.int32)
    prompt = jnp.concatenate([padding, tokens[:, :4]], axis=1)
    mask = jnp.arange(6)[None] >= jnp.full((B, 1), 2)
    logits, cache = step(variables, prompt, mask, cache)
    step_logits.append(logits[:, 2:])
  start = 0 if source is not None else 4
  real = jnp.ones((B, 1), bool)
  for t in range(start, T):
    logits, cache = step(variables, tokens[:, t : t + 1], real, cache)
    step_logits.append(logits)
  np.testing.assert_allclose(
    np.concatenate(step_logits, axis=1), expected, rtol=2e-4, atol=2e-4
  )


BY_TASK = dict(router=Task(), group_size=-1)


@pytest.mark.parametrize(
  ('moe', 'num_tasks', 'options', 'dispatch'),
  [
    ({}, 0, dict(platform='cpu'), few_tokens.Unrolled),
    ({}, 0, dict(platform='tpu'), Dropless),
    (dict(num_experts=600), 0, dict(platform='cpu'), Dropless),
    # Seven rows leave on average (1 - 2/5)^7 of the experts unused.
    ({}, 0, dict(platform='cpu', batch_size=7), few_tokens.Batched),
    # Rows of a task choose alike.
    (BY_TASK, 1, dict(platform='cpu', batch_size=30), few_tokens.Unrolled),
    (BY_TASK, 3, dict(platform='cpu', batch_size=30), few_tokens.Batched),
  ],
)
def test_experts_are_multiplied_as_a_step_needs(
  moe, num_tasks, options, dispatch
):
  trained = dataclasses.replace(tiny.options(ALL | moe), num_tasks=num_tasks)
  model = trained.build()
  model, _ = model.for_decoding({'params': tiny.params_of(model)}, **options)
  assert type(model.stacks.moe.dispatch) is dispatch


def test_a_checkpoints_own_rule_stays_where_it_can_bind():
  halves = dict(kind='encoder_decoder', positions=Relative())
  for rule, group_size, expected in (
    (Fixed(2), 0, [Fixed(2), All()]),
    (Fraction(1.0), -1, [Fraction(1.0)] * 2),
    # No checkpoint has groups of five tokens, which prompts need not fill.
    (PerToken(), 5, [All()] * 2),
    (Fixed(2), 5, [All()] * 2),
    (Fraction(0.5), 5, [All()] * 2),
  ):
    moe = dict(capacity=rule, group_size=group_size)
    trained = tiny.build(moe, **(halves if group_size < 5 else {}))
    model, _ = trained.for_decoding({'params': tiny.params_of(trained)})
    capacities = [stack.experts.capacity for stack in model.stacks.blocks]
    assert capacities == expected[: len(capacities)]
    if group_size == 5:
      assert not model.stacks.moe.group_size
      assert not model.stacks.capacity_binds and trained.stacks.capacity_binds


def test_what_is_prepared_passes_through():
  trained = tiny.build()
  boxed = models.init_params(trained, tiny.key(0))
  model, variables = trained.for_decoding({'params': boxed})
  assert model is not trained
  for tree, is_array in ((boxed, False), (variables, True)):
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, 'unbox'))
    assert {isinstance(leaf, jax.Array) for leaf in leaves} == {is_array}
  same_model, same_variables = model.for_decoding(variables)
  assert same_model is model and same_variables is variables


def test_a_window_is_never_wider_than_the_models_own():
  for own, expected in ((0, [0, 3, 9]), (4, [4, 3, 4])):
    model = tiny.build(attention=dict(window=own))
    variables = {'params': tiny.params_of(model)}
    windows = (
      generation.prepare(model, variables, window=window)[0]
      for window in (0, 3, 9)
    )
    assert [x.blocks.block.attention.window for x in windows] == expected


@pytest.mark.parametrize(
  ('positions', 'window', 'longest'),
  [
    (Relative(), 10, None),
    (NoPositions(), 10, None),
    (Learned(8), 0, 8),
    (Sinusoidal(), 0, None),
  ],
)
def test_how_far_text_may_go_is_the_positions_to_say(
  positions, window, longest
):
  model = tiny.build(positions=positions)
  assert decoding.window_beyond(model, 10) == window
  assert decoding.longest(model) == longest
  # Rows of an encoder-decoder have no text before them; an LSTM sees its state
  # only.
  pair_model = tiny.build(kind='encoder_decoder', positions=positions)
  assert decoding.window_beyond(pair_model, 10) == 0


def test_a_decoder_whose_experts_choose_does_not_decode():
  moe = dict(router=ExpertChoice(), allow_future_leak=True)
  models.check_generates(tiny.build(moe | dict(capacity=All())))
  model, lstm = tiny.build(moe), tiny.build(moe | dict(layers='1'), kind='lstm')
  for refused_call in (
    lambda: model.for_decoding({'params': tiny.params_of(model)}),
    lambda: model.make_cache(B, T),
    lambda: lstm.make_cache(B, T),
    lambda: models.check_generates(lstm),
  ):
    with pytest.raises(ValueError, match='does not decode token by token'):
      refused_call()
