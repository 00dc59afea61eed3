"""Decoding step by step equals the whole sequence at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models
from tests.models import tiny
from tests.models.tiny import B

S, T = 7, 9
ALL = dict(capacity_rule='all', dispatch='dropless')
CASES = {
  'mixtral': dict(num_kv_heads=2, sliding_window=4, moe=ALL),
  't5 decoder': dict(positions='relative', attention_scale='none', moe=ALL),
  'learned': dict(
    positions='learned',
    use_bias=True,
    norm='layernorm',
    moe=ALL | dict(layers='last 1', num_experts=600),  # too many to unroll
  ),
  # A token alone, and its threshold: in inference no other has a say.
  'strictly balanced': dict(
    moe=ALL
    | dict(router='strictly_balanced', gates='raw', allow_future_leak=True)
  ),
  'lstm': dict(
    kind='lstm',
    positions='none',
    num_layers=3,
    lstm=dict(hidden=7),
    moe=ALL
    | dict(
      layers='1',
      num_experts=6,
      branching=3,
      branches_selected=2,
      num_selected=4,
      router='noisy_top_k',
      balance_weight=0.0,
    ),
  ),
  'bigram': dict(moe=dict(router='hash', hash_of='bigram', **ALL)),
  'chosen in the encoder': dict(
    kind='encoder_decoder',
    num_encoder_layers=3,
    moe=dict(
      router='expert_choice',
      gates='raw',
      capacity_rule='per_assignment',
      capacity_factor=0.5,
      layers='none',
      encoder_layers='1',
    ),
  ),
  'hashed twice': dict(
    kind='encoder_decoder',
    positions='relative',
    moe=dict(router='hash', hash_of='bigram', **ALL),
  ),
  'dense': dict(positions='sinusoidal', num_layers=3, moe=dict(num_experts=0)),
  'switch': dict(
    kind='encoder_decoder',
    positions='relative',
    moe=dict(
      num_selected=1,
      gates='raw',
      capacity_rule='fixed',
      capacity_slots=2,
      route_padding=True,
      encoder_layers='1',
    ),
  ),
  'nllb': dict(
    kind='encoder_decoder',
    positions='sinusoidal',
    use_bias=True,
    moe=dict(
      capacity_rule='fraction',
      capacity_factor=1.0,
      group_size=-1,
      served_by='transformers_nllb',
      output_masking=0.2,
    ),
  ),
}


NUMBERS = ('num_experts', 'num_selected')


@functools.cache
def model_and_params(name):
  model = tiny.build(**CASES[name])
  return model, tiny.params_of(model)


def whole(name, tokens, source, source_mask):
  """Logits of the sequences at once; nothing of the decoder is dropped."""
  model, params = model_and_params(name)
  if name == 'switch':  # one-token steps cannot fill an expert
    own = model.config.decoder.block.moe
    moe = CASES[name]['moe'] | ALL
    roomy = tiny.build(**(CASES[name] | dict(moe=moe)))
    assert own.router.capacity.rule == 'fixed'
    model = model.clone(
      config=models.EncoderDecoderConfig(
        model.config.embedding, model.config.encoder, roomy.config.decoder
      )
    )
  inputs = {'tokens': tokens}
  if source is not None:
    inputs |= {
      'encoder_tokens': source,
      'encoder_segment_ids': source_mask.astype(jnp.int32),
      'segment_ids': jnp.ones_like(tokens),
    }
  run = jax.jit(lambda p: model.apply({'params': p}, **inputs)[0])
  return np.asarray(run(params))


@pytest.mark.parametrize(
  ('name', 'batch_size'), [*((name, 1) for name in CASES), ('mixtral', 7)]
)
def test_steps_equal_the_whole_sequence(name, batch_size):
  tokens = jnp.asarray(tiny.tokens(1, (B, T)))
  source = source_mask = None
  model, params = models.for_decoding(
    *model_and_params(name), batch_size=batch_size
  )
  step = jax.jit(functools.partial(model.apply, method='decode'))
  variables = {'params': params}
  if 'encoder' in CASES[name].get('kind', ''):
    source = jnp.asarray(tiny.tokens(2, (B, S)))
    source_mask = jnp.arange(S)[None] < jnp.array([[S], [4], [2]])
    encode = functools.partial(model.apply, max_len=T, method='encode')
    cache = jax.jit(encode)(variables, source, source_mask)
  else:
    cache = model.make_cache(B, T + 2)
  expected = whole(name, tokens, source, source_mask)
  assert np.std(expected) > 0.1
  found = []
  if source is None:  # a prompt of four, the rows padded in front
    front = jnp.zeros((B, 2), jnp.int32)
    prompt = jnp.concatenate([front, tokens[:, :4]], axis=1)
    mask = jnp.arange(6)[None] >= jnp.full((B, 1), 2)
    logits, cache = step(variables, prompt, mask, cache)
    found.append(logits[:, 2:])
  at = 0 if source is not None else 4
  real = jnp.ones((B, 1), bool)
  for t in range(at, T):
    logits, cache = step(variables, tokens[:, t : t + 1], real, cache)
    found.append(logits)
  np.testing.assert_allclose(
    np.concatenate(found, axis=1), expected, rtol=2e-4, atol=2e-4
  )


def test_rows_move_between_the_caches_rows():
  model, params = model_and_params('mixtral')
  variables = {'params': params}
  step = jax.jit(functools.partial(model.apply, method='decode'))
  tokens = jnp.asarray(tiny.tokens(3, (B, 5)))
  real = jnp.ones((B, 5), bool)
  _, cache = step(variables, tokens, real, model.make_cache(B, 8))
  rows = jnp.array([2, 0, 0])
  following = jnp.full((B, 1), 5)
  moved, _ = step(variables, following, real[:, :1], cache.take(rows))
  _, other = step(variables, tokens[rows], real, model.make_cache(B, 8))
  expected, _ = step(variables, following, real[:, :1], other)
  np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(moved[0] - moved[1])).max() > 1e-3


def test_experts_are_unrolled_on_a_cpu_where_they_are_few():
  model, params = model_and_params('mixtral')
  few, own = models.for_decoding(model, params, platform='cpu')
  assert few.config.moe.decoding == 'unrolled'
  layer = own['layers_period_1']['layer_0']['moe']['experts']
  stacked = params['layers']['layer_0']['moe']['experts']['w_in']
  np.testing.assert_array_equal(layer['expert_3']['w_in'], stacked[1, 3])
  other, _ = models.for_decoding(model, params, platform='tpu')
  assert not other.config.moe.decoding
  many, _ = models.for_decoding(*model_and_params('learned'))
  assert not many.config.moe.decoding


def test_experts_are_batched_where_a_step_chooses_most():
  model, params = model_and_params('mixtral')
  E, K = (getattr(model.config.moe.router, n) for n in NUMBERS)
  for rows, decoding in ((1, 'unrolled'), (7, 'batched')):
    assert ((1 - K / E) ** rows < 0.5) == (decoding == 'batched')
    found, own = models.for_decoding(
      model, params, batch_size=rows, platform='cpu'
    )
    assert found.config.moe.decoding == decoding
  layer = own['layers_period_1']['layer_0']['moe']['experts']
  stacked = params['layers']['layer_0']['moe']['experts']['w_in']
  np.testing.assert_array_equal(layer['w_in'], stacked[1])


def test_a_checkpoints_own_rule_stays_where_it_can_bind():
  switch = models.for_decoding(*model_and_params('switch'))[0].config
  assert switch.encoder.block.moe.router.capacity.rule == 'fixed'
  assert switch.decoder.block.moe.router.capacity.rule == 'all'
  nllb = models.for_decoding(*model_and_params('nllb'))[0].config
  assert nllb.decoder.block.moe.router.capacity.rule == 'fraction'
  trained = tiny.build(moe=dict(group_size=5))
  config = models.for_decoding(trained, tiny.params_of(trained))[0].config
  assert config.moe.router.capacity.rule == 'all' and not config.moe.group_size


def test_a_decoder_whose_experts_choose_does_not_decode():
  moe = dict(router='expert_choice', gates='raw', allow_future_leak=True)
  model = tiny.build(moe=moe)
  with pytest.raises(ValueError, match='does not decode token by token'):
    models.for_decoding(model, tiny.params_of(model))
  with pytest.raises(ValueError, match='does not decode token by token'):
    model.make_cache(B, T)
  models.check_generates(tiny.build(moe=moe | dict(capacity_rule='all')))
  lstm = tiny.build(kind='lstm', positions='none', moe=moe | dict(layers='1'))
  for refused in (lstm.make_cache, lambda *_: models.check_generates(lstm)):
    with pytest.raises(ValueError, match='does not decode token by token'):
      refused(B, T)


def test_a_model_of_classes_does_not_generate():
  section = dict(kind='adaptive', feature_shape=(2,))
  with pytest.raises(ValueError, match='AdaptiveMixture does not generate'):
    models.check_generates(tiny.build(**section))
