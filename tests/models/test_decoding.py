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
from moe_jax.models import decoding
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import All, Fixed, Fraction, PerToken
from tests.models import tiny
from tests.models.tiny import B

S, T = 7, 9
ALL = dict(capacity=All(), dispatch=Dropless())
RENORMALIZED = TokenChoice(gates='renormalized')


def longrope(original_len):
  factors = (1.5, 2.0, 3.0), (4.0, 6.0, 9.0)
  return LongRope(*factors, original_len, factor=8.0, long_mscale=1.4)


CASES = {
  'mixtral': dict(attention=dict(num_kv_heads=2, window=4), moe=ALL),
  'gpt-oss': dict(
    attention=dict(num_kv_heads=2, window=3, full_layers='every 2', sinks=True),
    positions=Rotary(scaling=Yarn(factor=4.0, original_len=3)),
    num_layers=4,
    moe=ALL,
  ),
  't5 with a window': dict(
    positions=Relative(), attention=dict(window=4, scale='none'), moe=ALL
  ),
  # Prompts are expanded, single tokens meet the cache as it is.
  'deepseek': dict(
    attention=LatentOptions(
      4,
      query_rank=7,
      kv_rank=6,
      plain_width=2,
      rotary_width=4,
      value_width=2,
      window=4,
      sinks=True,
    ),
    positions=Rotary(interleaved=True),
    moe=ALL
    | dict(
      num_experts=6,
      router=TokenChoice(
        gates='sigmoid_renormalized',
        gate_scale=2.5,
        expert_groups=3,
        chosen_expert_groups=2,
        expert_group_score='two_best',
      ),
      shared_expert=SharedExpertOptions(9, gated=True),
    ),
  ),
  # The prompt of four tokens is long.
  'longrope with fewer experts': dict(
    positions=Rotary(scaling=longrope(3)),
    moe=ALL | dict(retained=Retained('0:4', '1: 0 1 1 2 1')),
  ),
  'learned': dict(
    positions=Learned(),
    use_bias=True,
    norm=LayerNorm(),
    # These are too many experts to unroll.
    moe=ALL | dict(layers='last 1', num_experts=600),
  ),
  # In inference a token is compared to thresholds, independently of others.
  'strictly balanced': dict(
    attention=dict(num_kv_heads=2, qk_norm='all', clip=1.5, biases='key, out'),
    moe=ALL | dict(router=StrictlyBalanced(), allow_future_leak=True),
  ),
  'lstm': dict(
    kind='lstm',
    positions=NoPositions(),
    num_layers=3,
    lstm=dict(hidden=7),
    moe=ALL
    | dict(
      layers='1',
      num_experts=6,
      num_selected=4,
      router=Hierarchical(
        branching=3, branches_selected=2, noisy=True, gates='renormalized'
      ),
    ),
  ),
  'bigram': dict(
    attention=dict(num_kv_heads=2, scale='fixed', fixed_scale=0.3),
    embedding=dict(multiplier=3.0, logits_divisor=2.0),
    residual_multiplier=0.4,
    moe=dict(router=Hash(of='bigram'), **ALL),
  ),
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
  'nllb': dict(
    kind='encoder_decoder',
    positions=Sinusoidal(),
    use_bias=True,
    moe=dict(
      router=RENORMALIZED,
      capacity=Fraction(1.0),
      group_size=-1,
      output_masking=0.2,
    ),
  ),
}


@functools.cache
def model_and_params(name):
  model = tiny.build(**CASES[name])
  return model, tiny.params_of(model)


def whole_logits(name, tokens, source, source_mask):
  """Logits of whole sequences; the decoder drops no token."""
  model, params = model_and_params(name)
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
  run = jax.jit(lambda p: model.apply({'params': p}, **inputs)[0])
  return np.asarray(run(params))


# One of each kind of model is also compiled with all optimizations.
OPTIMIZED = ('mixtral', 'switch', 'lstm')
# Tokens of such a model, generated, are those of transformers'.
ELSEWHERE = ('nllb',)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name, marks=[pytest.mark.as_users_compile] * (name in OPTIMIZED)
    )
    for name in CASES
    if name not in ELSEWHERE
  ],
)
def test_steps_equal_the_whole_sequence(name):
  tokens = jnp.asarray(tiny.tokens(1, (B, T)))
  source = source_mask = None
  model, params = model_and_params(name)
  model, variables = model.for_decoding({'params': params}, batch_size=1)
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


def prepared(name, **options):
  """The model that decodes, and its parameters."""
  model, params = model_and_params(name)
  model, variables = model.for_decoding({'params': params}, **options)
  return model, variables['params']


def test_experts_are_unrolled_on_a_cpu_where_they_are_few():
  _, params = model_and_params('mixtral')
  small_model, small_params = prepared('mixtral', platform='cpu')
  assert isinstance(small_model.stacks.moe.dispatch, few_tokens.Unrolled)
  layer = small_params['layers_period_1']['layer_0']['moe']['experts']
  stacked = params['layers']['layer_0']['moe']['experts']['w_in']
  np.testing.assert_array_equal(layer['expert_3']['w_in'], stacked[1, 3])
  tpu_model, _ = prepared('mixtral', platform='tpu')
  large_model, _ = prepared('learned', platform='cpu')
  assert (
    tpu_model.stacks.moe.dispatch
    == large_model.stacks.moe.dispatch
    == Dropless()
  )


def test_experts_are_batched_where_a_step_chooses_most():
  model, params = model_and_params('mixtral')
  E, K = model.stacks.moe.num_experts, model.stacks.moe.num_selected
  for rows, dispatch in ((1, few_tokens.Unrolled), (7, few_tokens.Batched)):
    assert ((1 - K / E) ** rows < 0.5) == (dispatch is few_tokens.Batched)
    served_model, served_params = prepared(
      'mixtral', batch_size=rows, platform='cpu'
    )
    assert type(served_model.stacks.moe.dispatch) is dispatch
  layer = served_params['layers_period_1']['layer_0']['moe']['experts']
  stacked = params['layers']['layer_0']['moe']['experts']['w_in']
  np.testing.assert_array_equal(layer['w_in'], stacked[1])


@pytest.mark.parametrize(
  ('tasks', 'dispatch'), [(1, few_tokens.Unrolled), (3, few_tokens.Batched)]
)
def test_rows_of_a_task_choose_alike(tasks, dispatch):
  moe = dict(
    num_experts=5, num_selected=2, router=Task(), capacity=All(), group_size=-1
  )
  options = dataclasses.replace(tiny.options(moe), num_tasks=tasks)
  model = options.build()
  params = tiny.params_of(model)
  model, _ = model.for_decoding(
    {'params': params}, batch_size=30, platform='cpu'
  )
  assert type(model.stacks.moe.dispatch) is dispatch


def test_a_checkpoints_own_rule_stays_where_it_can_bind():
  def capacities(name):
    stacks = prepared(name)[0].stacks
    return [stack.experts.capacity for stack in stacks.blocks]

  assert capacities('switch') == [Fixed(2), All()]
  assert capacities('nllb') == [Fraction(1.0)] * 2
  # No checkpoint has groups of five tokens, which prompts need not fill.
  for rule in (PerToken(), Fixed(2), Fraction(0.5)):
    trained = tiny.build(moe=dict(group_size=5, capacity=rule))
    model, _ = trained.for_decoding({'params': tiny.params_of(trained)})
    assert model.stacks.moe.capacity == All()
    assert not model.stacks.moe.group_size
    assert not model.stacks.capacity_binds and trained.stacks.capacity_binds


def test_what_is_prepared_passes_through():
  trained = tiny.build()
  model, variables = trained.for_decoding({'params': tiny.params_of(trained)})
  assert model is not trained
  same_model, same_variables = model.for_decoding(variables)
  assert same_model is model and same_variables is variables


def test_a_window_is_never_wider_than_the_models_own():
  windows = {}
  for model_window in (0, 4):
    model = tiny.build(attention=dict(window=model_window))
    variables = {'params': tiny.params_of(model)}
    windows[model_window] = [
      generation.prepare(model, variables, window=window)[
        0
      ].blocks.block.attention
      for window in (0, 3, 9)
    ]
  assert [a.window for a in windows[0]] == [0, 3, 9]
  assert [a.window for a in windows[4]] == [4, 3, 4]


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
  model = tiny.build(moe=moe)
  with pytest.raises(ValueError, match='does not decode token by token'):
    model.for_decoding({'params': tiny.params_of(model)})
  with pytest.raises(ValueError, match='does not decode token by token'):
    model.make_cache(B, T)
  models.check_generates(tiny.build(moe=moe | dict(capacity=All())))
  lstm = tiny.build(moe | dict(layers='1'), kind='lstm')
  for refused_call in (
    lstm.make_cache,
    lambda *_: models.check_generates(lstm),
  ):
    with pytest.raises(ValueError, match='does not decode token by token'):
      refused_call(B, T)
