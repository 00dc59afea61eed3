"""transformers' Phi-3.5-MoE (arXiv:2404.14219) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- SparseMixer chooses two experts, one after the other; each gate is the chosen
  expert's probability among the experts, not chosen before, whose logits are
  near the largest.
- Norms are LayerNorms with a bias, and logits may have one.
- In texts longer than those of the first training, LongRoPE's factor of queries
  and keys changes, but not the frequencies of rotation, which stay those of
  short texts. Unlike in transformers, each text of a batch is long or short by
  itself.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax.config import fields_of
from moe_jax.interop import decoders, rotary_keys
from moe_jax.interop.config_keys import RATE, Values
from moe_jax.interop.decoders import layer
from moe_jax.interop.mapping import Name
from moe_jax.interop.quirks import ShortTurns
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.positions import Positions, Rotary
from moe_jax.layers.rotary import LongRope
from moe_jax.layers.routers import SparseMixer
from moe_jax.models import DecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions

_ROPE = dict(rope_theta=1e6)
KEYS = decoders.keys(
  dict(
    vocab_size=32064,
    num_key_value_heads=8,
    attention_bias=False,
    intermediate_size=6400,
    num_local_experts=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    sliding_window=None,
  ),
  honoured={'router_jitter_noise': (RATE, 0.01), 'lm_head_bias': (bool, False)},
  training={'input_jitter_noise': decoders.JITTER},
  ignored=['hidden_dropout'],  # transformers 5.24 does nothing with it
)


def _problems(c: Values) -> Iterator[str]:
  if c.num_experts_per_tok != 2:
    num_selected = c.num_experts_per_tok
    yield f'num_experts_per_tok={num_selected} is not supported, only 2'


def _options(c: Values) -> dict[str, Any]:
  return dict(
    router=SparseMixer(threshold=2 * float(c.router_jitter_noise)),
    norm=LayerNorm(float(c.rms_norm_eps), bias='always'),
    positions=_as(ShortTurns, rotary_keys.rotary(c, _ROPE)),
    embedding=EmbeddingOptions(
      tie=c.tie_word_embeddings, logits_bias=c.lm_head_bias
    ),
  )


def _as(kind: type[LongRope], positions: Positions) -> Positions:
  """The positions; if they have LongRoPE, it becomes an instance of `kind`.

  An import has `ShortTurns`, as transformers computes; an export undoes that.
  """
  scaling = getattr(positions, 'scaling', None)
  if not isinstance(positions, Rotary) or not isinstance(scaling, LongRope):
    return positions
  names = fields_of(LongRope)
  scaling = kind(**{name: getattr(scaling, name) for name in names})
  return dataclasses.replace(positions, scaling=scaling)


def _describe(o: DecoderOptions) -> dict[str, Any]:
  positions = _as(LongRope, o.positions)
  return dict(
    rope_parameters=rotary_keys.rope_parameters(positions),
    router_jitter_noise=getattr(o.moe.router, 'threshold', 0.02) / 2,
    lm_head_bias=o.embedding.logits_bias,
  )


ARCHITECTURES = (
  decoders.decoder(
    'phimoe',
    'Phimoe',
    KEYS,
    {
      **decoders.DECODER,
      'b_logits': (Name('lm_head.bias', 'V'),),
      'final_norm/bias': (Name('model.norm.bias', 'M'),),
      **layer('attention_norm/bias', ('input_layernorm.bias', 'M')),
      **layer('ffn_norm/bias', ('post_attention_layernorm.bias', 'M')),
      **decoders.router('block_sparse_moe.gate', 'mlp.router'),
      **decoders.experts('block_sparse_moe.experts', 'w1', 'w3', 'w2'),
    },
    options=_options,
    describe=_describe,
    problems=_problems,
    rope=_ROPE,
    rope_types=('default', 'longrope'),
    # The publisher's own code has the last name for the class of the first.
    classes=('PhimoeForCausalLM', 'PhimoeModel', 'PhiMoEForCausalLM'),
  ),
)
