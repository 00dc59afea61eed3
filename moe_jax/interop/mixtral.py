"""transformers' Mixtral (arXiv:2401.04088) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Positions count padding, too; only their differences matter.
- `sliding_window` includes the token itself.
- `head_dim` may differ from the width over the number of heads; gates are the
  chosen experts' probabilities, divided by their sum (`gates='renormalized'`).
- In memory, experts are fused (`gate_up_proj`); in files each has its own
  tensor. All names are read, and those of files are written.
"""

from typing import Any, cast

from moe_jax.interop.architecture import (
  Architecture,
  filled,
  unsupported,
  written,
)
from moe_jax.interop.config_keys import (
  AMOUNT,
  COMMON_FIXED,
  COMMON_IGNORED,
  LAYERS,
  OPTIONAL_COUNT,
  OPTIONAL_POSITIVE,
  OPTIONAL_SIZE,
  POSITIVE,
  RATE,
  SIZE,
  Keys,
  Values,
)
from moe_jax.interop.decoder_names import BLOCK, ENDS, experts, layer
from moe_jax.interop.mapping import Name
from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.experts import Dropless, FeedForwardExpert
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe import MoeOptions
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.positions import Rotary
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.routing.capacity import All

_ACTIVATIONS = {
  'silu': 'swiglu',
  'swish': 'swiglu',
  'gelu_pytorch_tanh': 'geglu',
  'gelu_new': 'geglu',
}
_THETA = 1e6
KEYS = Keys(
  honoured={
    'vocab_size': (SIZE, 32000),
    'hidden_size': (SIZE, 4096),
    'intermediate_size': (SIZE, 14336),
    'num_hidden_layers': (LAYERS, 32),
    'num_attention_heads': (SIZE, 32),
    'num_key_value_heads': (OPTIONAL_SIZE, 8),
    'head_dim': (OPTIONAL_SIZE, None),
    'hidden_act': (str, 'silu'),
    'rms_norm_eps': (POSITIVE, 1e-5),
    'tie_word_embeddings': (bool, False),
    'sliding_window': (OPTIONAL_COUNT, None),
    'num_experts_per_tok': (SIZE, 2),
    'num_local_experts': (SIZE, 8),
    'rope_parameters': (dict | None, None),
    'rope_scaling': (dict | None, None),
    'rope_theta': (OPTIONAL_POSITIVE, None),
  },
  training={
    'attention_dropout': (
      RATE,
      0.0,
      0.0,
      'our dropout is on residuals and hidden values too; see model.dropout',
    ),
    'router_jitter_noise': (
      RATE,
      0.0,
      0.0,
      'it multiplies what the experts see too; see moe.jitter for the router',
    ),
    'router_aux_loss_coef': (AMOUNT, 0.001, ..., ''),
  },
  fixed={**COMMON_FIXED, 'is_encoder_decoder': (False,)},
  ignored={
    **COMMON_IGNORED,
    'initializer_range': 'the parameters are there',
    'max_position_embeddings': 'rotary positions have no table',
    'pad_token_id': 'masks say what padding is',
  },
)


def problems(c: Values) -> list[str]:
  """A text for each value that our decoders cannot express."""
  wrong = unsupported('hidden_act', c.hidden_act, _ACTIVATIONS)
  if c.num_experts_per_tok == 1:
    wrong.append(
      'num_experts_per_tok=1 is not supported: every gate would be 1'
    )
  if c.sliding_window is not None and c.sliding_window < 1:
    wrong.append(f'sliding_window={c.sliding_window} must be at least 1')
  kind, theta, more = _rope(c)
  if not POSITIVE.holds(theta):
    wrong.append(f'rope_theta={theta!r:.80} is no {POSITIVE.rule}')
  if kind != 'default' or more:
    wrong.append(
      f'rope type {kind!r} with {more} is not supported, only the type '
      "'default' with a rope_theta"
    )
  return wrong


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  heads = max(c.num_attention_heads, 1)
  _, theta, _ = _rope(c)
  return DecoderOptions(
    vocab_size=c.vocab_size,
    num_layers=c.num_hidden_layers,
    width=c.hidden_size,
    attention=AttentionOptions(
      num_heads=c.num_attention_heads,
      num_kv_heads=c.num_key_value_heads or c.num_attention_heads,
      head_width=c.head_dim or c.hidden_size // heads,
      window=c.sliding_window or 0,
    ),
    ffn=FfnOptions(c.intermediate_size, _ACTIVATIONS[c.hidden_act]),
    norm=RmsNorm(float(c.rms_norm_eps)),
    positions=Rotary(float(theta)),
    embedding=EmbeddingOptions(tie=c.tie_word_embeddings),
    moe=MoeOptions(
      num_experts=c.num_local_experts,
      num_selected=c.num_experts_per_tok,
      layers='all',
      router=TokenChoice(
        gates='renormalized',
        balance_weight=float(c.router_aux_loss_coef),
        z_weight=0.0,
      ),
      capacity=All(),
      dispatch=Dropless(),
    ),
  )


def _rope(c: Values) -> tuple[Any, Any, dict[str, Any]]:
  """The type of rotary positions, their theta, and all other parameters.

  Keys of older and newer versions of transformers are read.
  """
  given = {**(c.rope_scaling or {}), **(c.rope_parameters or {})}
  kind = given.pop('rope_type', given.pop('type', 'default'))
  given.pop('type', None)
  theta = given.pop('rope_theta', c.rope_theta)
  given = {key: value for key, value in given.items() if value is not None}
  if given.get('partial_rotary_factor') == 1:
    given.pop('partial_rotary_factor')
  return kind, _THETA if theta is None else theta, given


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  if not isinstance(o, DecoderOptions):
    raise ValueError('it has an encoder, or no blocks')
  if not o.has_experts:
    raise ValueError('it is dense; Mixtral has experts in every layer')
  attention, moe = filled(o, o.width)
  expert = cast(FeedForwardExpert, moe.expert)
  return dict(
    vocab_size=o.vocab_size,
    hidden_size=o.width,
    intermediate_size=expert.hidden,
    num_hidden_layers=o.num_layers,
    num_attention_heads=attention.num_heads,
    num_key_value_heads=attention.num_kv_heads,
    head_dim=attention.head_width,
    hidden_act=written(expert.activation, _ACTIVATIONS),
    rms_norm_eps=o.norm.epsilon,
    tie_word_embeddings=o.embedding.tie,
    sliding_window=attention.window or None,
    num_experts_per_tok=moe.num_selected,
    num_local_experts=moe.num_experts,
    rope_parameters=dict(
      rope_type='default', rope_theta=getattr(o.positions, 'theta', _THETA)
    ),
  )


ARCHITECTURE = Architecture(
  model_type='mixtral',
  classes=('MixtralForCausalLM', 'MixtralModel'),
  keys=KEYS,
  problems=problems,
  options=options,
  describe=describe,
  suits=lambda o: not o.has_encoder,
  prefix='model.',
  computed=(r'rotary_emb\.inv_freq$',),
  names={
    **ENDS,
    **BLOCK,
    **layer(
      'moe/router/w',
      Name('block_sparse_moe.gate.weight', 'E M -> M E'),
      Name('mlp.gate.weight', 'E M -> M E'),
    ),
    **experts('block_sparse_moe.experts', 'w1', 'w3', 'w2'),
  },
)
