"""The encoder-decoder: attention, packed examples, routing of both stacks.

`tests/interop` compares it to another implementation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.positions import Relative, Sinusoidal
from moe_jax.layers.routers import ExpertChoice, TokenChoice
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import All, PerToken
from tests.models import tiny
from tests.models.tiny import B, V

S, T = 7, 9  # lengths of the encoder's and the decoder's rows

KINDS = {
  't5': dict(
    positions=Relative(buckets=6, max_distance=5),
    attention=dict(scale='none'),
    embedding=dict(logits_scale='inverse_sqrt_width'),
    encoder={'moe': {'layers': '1'}},
    moe={},
  ),
  'nllb': dict(
    positions=Sinusoidal(offset=2),
    embedding=dict(scale='sqrt_width'),
    norm=LayerNorm(),
    use_bias=True,
    encoder={'attention': {'num_heads': 2}, 'ffn': {'hidden': 14}},
    moe=dict(
      output_masking=0.25,
      router=TokenChoice(gates='renormalized', use_bias=True),
    ),
  ),
}


def build(kind, **changes):
  options = {**KINDS[kind], **changes}
  moe = {'capacity': All(), **KINDS[kind]['moe'], **options.pop('moe')}
  encoder = EncoderOptions(3, options.pop('encoder'))
  return tiny.build(moe, 'encoder_decoder', encoder=encoder, **options)


@functools.cache
def program(kind):
  """Parameters, and a compiled function (params, batch) -> (logits, aux)."""
  model = build(kind)
  run = jax.jit(lambda params, batch: model.apply({'params': params}, **batch))
  return tiny.params_of(model), run


def make_batch(seed=0, **changes):
  """A batch of two examples in the first row and one in the others, padded."""
  rng = np.random.default_rng(seed)
  encoder_ids = [[1] * 4 + [2] * 3, [1] * 5 + [0] * 2, [1] * 7]
  ids = [[1] * 3 + [2] * 4 + [0] * 2, [1] * 9, [1] * 2 + [0] * 7]

  def positions_of(rows):
    return [[row[:i].count(x) for i, x in enumerate(row)] for row in rows]

  arrays = {
    'encoder_tokens': rng.integers(0, V, (B, S)),
    'tokens': rng.integers(0, V, (B, T)),
    'encoder_segment_ids': encoder_ids,
    'segment_ids': ids,
    'encoder_positions': positions_of(encoder_ids),
    'positions': positions_of(ids),
  }
  arrays |= changes
  return {key: jnp.asarray(value, jnp.int32) for key, value in arrays.items()}


def logits_of(kind, batch):
  params, run = program(kind)
  return np.asarray(run(params, batch)[0])


def test_packed_examples_are_apart():
  packed = make_batch()
  packed_logits = logits_of('t5', packed)[0]
  assert packed_logits.std() > 0.1
  for encoder_span, decoder_span in (((0, 4), (0, 3)), ((4, 7), (3, 7))):

    def single_row(name, length, span):
      row = np.zeros((B, length), np.int32)
      row[0, : span[1] - span[0]] = np.asarray(packed[name])[0, slice(*span)]
      if name.endswith('segment_ids'):
        row[0] = row[0] > 0
      return row

    names = ('tokens', 'segment_ids', 'positions')
    single_rows = {name: single_row(name, T, decoder_span) for name in names}
    single_rows |= {
      name: single_row(name, S, encoder_span)
      for name in (f'encoder_{n}' for n in names)
    }
    logits = logits_of('t5', make_batch(**single_rows))[0]
    np.testing.assert_allclose(
      logits[: decoder_span[1] - decoder_span[0]],
      packed_logits[slice(*decoder_span)],
      rtol=2e-4,
      atol=2e-4,
    )


def test_a_decoder_sees_no_later_token_and_all_of_its_encoder():
  batch = make_batch()
  before = logits_of('t5', batch)
  tokens = np.array(batch['tokens'])
  tokens[1, 5] = (tokens[1, 5] + 1) % V
  after = logits_of('t5', batch | {'tokens': jnp.asarray(tokens)})
  np.testing.assert_array_equal(after[1, :5], before[1, :5])
  assert np.abs(after[1, 5:] - before[1, 5:]).max(-1).min() > 1e-4
  source = np.array(batch['encoder_tokens'])
  source[1, 4] = (source[1, 4] + 1) % V  # the last token before padding
  after = logits_of('t5', batch | {'encoder_tokens': jnp.asarray(source)})
  assert np.abs(after[1] - before[1]).max(-1).min() > 1e-5
  np.testing.assert_array_equal(after[2], before[2])


def test_padding_changes_nothing_and_is_not_counted():
  batch = make_batch()
  tokens, source = np.array(batch['tokens']), np.array(batch['encoder_tokens'])
  tokens[2, 4:], source[1, 5:] = 3, 3
  changed_batch = batch | {
    'tokens': jnp.asarray(tokens), 'encoder_tokens': jnp.asarray(source)
  }  # fmt: skip
  real = np.asarray(batch['segment_ids']) > 0
  np.testing.assert_array_equal(
    logits_of('t5', changed_batch)[real], logits_of('t5', batch)[real]
  )
  params, run = program('t5')
  aux = run(params, batch)[1]
  sparse = [moe is not None for moe in build('t5').stacks.moes]
  encoder_tokens = (np.asarray(batch['encoder_segment_ids']) > 0).sum()
  counts = [encoder_tokens * flag for flag in sparse[:3]]
  counts += [real.sum() * flag for flag in sparse[3:]]
  np.testing.assert_array_equal(aux.stats.tokens, counts)


def test_the_two_stacks_have_their_own_pattern_and_widths():
  model = build('t5')
  assert (
    model.stacks.sparse_layers == (1, 3, 4) and model.stacks.num_layers == 5
  )
  assert [model.stacks.sequence_of(i) for i in (2, 3)] == ['encoder_', '']
  encoder, decoder = (stack.block for stack in build('nllb').stacks.blocks)
  assert (encoder.attention.num_heads, encoder.ffn.hidden) == (2, 14)
  assert (decoder.attention.num_heads, decoder.ffn.hidden) == (4, 20)
  assert decoder.cross and not encoder.cross


@pytest.mark.slow
def test_every_parameter_of_both_stacks_gets_a_gradient():
  params, _ = program('nllb')
  model = build('nllb')

  @jax.jit
  def gradient(params):
    def loss(params):
      logits, aux = model.apply({'params': params}, **make_batch())
      return (logits**2).mean() + aux.z_loss.sum()

    return jax.grad(loss)(params)

  for name, leaf in tiny.leaves(gradient(params)).items():
    if name.endswith('b_key'):
      # Adding one vector to all keys changes all scores of a query equally.
      continue
    assert np.abs(np.asarray(leaf)).max() > 1e-9, name


def test_one_half_without_segments_is_refused():
  model, batch = build('t5'), make_batch()
  del batch['segment_ids'], batch['positions']
  with pytest.raises(ValueError, match='given together or not at all'):
    jax.eval_shape(
      lambda p: model.apply({'params': p}, **batch), tiny.params_of(model)
    )


def test_a_leak_in_the_encoder_alone_is_none():
  leak = {'token_choice': {'slot_priority': 'batch_priority'}}
  moe = dict(capacity=PerToken())
  model = build('t5', moe=moe, encoder={'moe': {'layers': '1', 'router': leak}})
  priorities = [
    stack.experts.router.slot_priority for stack in model.stacks.blocks
  ]
  assert priorities == ['batch_priority', 'token_major']
  assert not model.stacks.leaks_future
  moe['router'] = TokenChoice(slot_priority='batch_priority')
  with pytest.raises(ValueError, match="slot_priority='batch_priority'"):
    build('t5', moe=moe)


def test_fewer_kv_heads_and_a_window_are_the_decoders_alone():
  attention = dict(num_kv_heads=2, window=4)
  model = tiny.build(kind='encoder_decoder', attention=attention)
  encoder, decoder = (stack.block.attention for stack in model.stacks.blocks)
  assert (encoder.num_kv_heads, encoder.window) == (4, 0)
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


REFUSED = {
  "encoder.overrides: unknown config key 'ffm'; did you mean 'ffn'": dict(
    ffm=1
  ),
  "encoder.overrides: unknown config key 'width'": dict(width=16),
  r'encoder.overrides: ffn.hidden=0 must be at least 1': {'ffn': {'hidden': 0}},
  'encoder.overrides: attention.num_heads=5 does not divide width=12': {
    'attention': {'num_heads': 5, 'head_width': 0}
  },
  "encoder.overrides: moe.layer_reduce='mean', and 'sum' in the decoder": {
    'moe': {'layer_reduce': 'mean'}
  },
  "encoder.overrides: moe.replay='trace', and '' in the decoder": {
    'moe': {'replay': 'trace'}
  },
  'encoder.overrides: attention.window=3 has no effect in an encoder': {
    'attention': {'window': 3}
  },
  'encoder.overrides: moe.router.token_choice.jitter=0.1 has no effect with': {
    'moe': {
      'router': {'kind': 'expert_choice', 'token_choice': {'jitter': 0.1}}
    }
  },
}


@pytest.mark.parametrize('message', REFUSED)
def test_bad_overrides_are_refused_by_name(message):
  encoder = EncoderOptions(0, REFUSED[message])
  with pytest.raises(ValueError, match=message):
    tiny.options(kind='encoder_decoder', encoder=encoder)


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
