"""transformers' Phi-3.5-MoE (arXiv:2404.14219) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- SparseMixer chooses two experts, one after the other; each gate is a
  probability among the experts near the best that is left.
- Norms are LayerNorms with a bias, and logits may have one.
- In texts longer than the first training's, LongRoPE's factor of queries and
  keys changes, but not the turns of pairs, which stay those of short texts.
  Unlike there, each text of a batch is long or short by itself.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax.config import fields_of
from moe_jax.errors import InputError
from moe_jax.interop import decoders, rotary_keys
from moe_jax.interop.config_keys import OPTIONAL_LENGTH, RATE, SIZE, Values
from moe_jax.interop.decoders import BLOCK, ENDS, Table, decoder, experts, layer
from moe_jax.interop.mapping import Name
from moe_jax.interop.quirks import ShortTurns
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.positions import Rotary
from moe_jax.layers.rotary import LongRope
from moe_jax.layers.routers import SparseMixer
from moe_jax.models import DecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions

_THETA = 1e6
_ROPES = ('default', 'longrope')
KEYS = decoders.keys(
  dict(
    vocab_size=32064,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.001,
  ),
  honoured={
    'intermediate_size': (SIZE, 6400),
    'num_local_experts': (SIZE, 16),
    'router_jitter_noise': (RATE, 0.01),
    'sliding_window': (OPTIONAL_LENGTH, None),
    'attention_bias': (bool, False),
    'lm_head_bias': (bool, False),
  },
  training={
    'input_jitter_noise': (
      RATE,
      0.0,
      0.0,
      'it multiplies what the experts see too; see moe.jitter for the router',
    ),
  },
  ignored={'hidden_dropout': 'transformers 5.24 does nothing with it'},
  spellings={'num_experts': 'num_local_experts'},
)


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from decoders.problems(c, theta=_THETA, rope_types=_ROPES)
  if c.num_experts_per_tok != 2:
    num_selected = c.num_experts_per_tok
    yield f'num_experts_per_tok={num_selected} is not supported, only 2'


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  positions = rotary_keys.rotary(c, _THETA)
  if isinstance(positions.scaling, LongRope):
    scaling = _as(ShortTurns, positions.scaling)
    positions = dataclasses.replace(positions, scaling=scaling)
  return decoders.options(
    c,
    SparseMixer(threshold=2 * float(c.router_jitter_noise)),
    decoders.heads(c, window=c.sliding_window or 0),
    norm=LayerNorm(float(c.rms_norm_eps), bias='always'),
    positions=positions,
    embedding=EmbeddingOptions(
      tie=c.tie_word_embeddings, logits_bias=c.lm_head_bias
    ),
  )


def _as(kind: type[LongRope], scaling: LongRope) -> LongRope:
  """The scaling with the same options as another kind."""
  return kind(**{name: getattr(scaling, name) for name in fields_of(LongRope)})


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  positions = o.positions
  if isinstance(positions, Rotary) and isinstance(
    positions.scaling, ShortTurns
  ):
    scaling = _as(LongRope, positions.scaling)
    positions = dataclasses.replace(positions, scaling=scaling)
  shared = decoders.describe(
    dataclasses.replace(o, positions=positions), 'Phi-3.5-MoE', KEYS
  )
  router = o.moe.router
  if not isinstance(router, SparseMixer):
    raise InputError(f'its router is {type(router).__name__}')
  return shared | dict(
    router_jitter_noise=router.threshold / 2,
    lm_head_bias=o.embedding.logits_bias,
  )


NAMES: Table = {
  **ENDS,
  **BLOCK,
  'b_logits': (Name('lm_head.bias', 'V'),),
  'final_norm/bias': (Name('model.norm.bias', 'M'),),
  **layer('attention_norm/bias', Name('input_layernorm.bias', 'M')),
  **layer('ffn_norm/bias', Name('post_attention_layernorm.bias', 'M')),
  **layer(
    'moe/router/w',
    Name('block_sparse_moe.gate.weight', 'E M -> M E'),
    Name('mlp.router.weight', 'E M -> M E'),
  ),
  **experts('block_sparse_moe.experts', 'w1', 'w3', 'w2'),
}
# The publisher's own code spells the first name like the last one.
_CLASSES = ('PhimoeForCausalLM', 'PhimoeModel', 'PhiMoEForCausalLM')
ARCHITECTURE = decoder(
  'phimoe', 'Phimoe', KEYS, problems, options, describe, NAMES, classes=_CLASSES
)
