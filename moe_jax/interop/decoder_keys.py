"""Keys of config.json that many of transformers' decoders share.

These decoders have pre-norm blocks with root mean square norms, rotary
positions, grouped keys and gated feed-forwards, and drop no token.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from moe_jax.errors import InputError
from moe_jax.interop import rotary_keys
from moe_jax.interop.architecture import (
  activation_problems,
  attention_and_moe,
  their_activation,
)
from moe_jax.interop.config_keys import (
  AMOUNT,
  COMMON_FIXED,
  COMMON_IGNORED,
  LAYERS,
  OPTIONAL_LENGTH,
  OPTIONAL_SIZE,
  POSITIVE,
  RATE,
  SIZE,
  Keys,
  Values,
)
from moe_jax.layers.attention import AttentionBase, AttentionOptions
from moe_jax.layers.experts import Dropless, FeedForwardExpert
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.routers import RouterOptions, TokenChoice
from moe_jax.models import DecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.routing.capacity import All

ACTIVATIONS = {
  'silu': 'swiglu',
  'swish': 'swiglu',
  'gelu_pytorch_tanh': 'geglu',
  'gelu_new': 'geglu',
}


_DROPLESS = {'capacity': All(), 'dispatch': Dropless()}


def keys(
  defaults: Mapping[str, Any],
  honoured: Mapping[str, tuple[Any, Any]],
  training: Mapping[str, tuple[Any, Any, Any, str]] | None = None,
  fixed: Mapping[str, tuple[Any, ...]] | None = None,
  ignored: Mapping[str, str] | None = None,
  spellings: Mapping[str, str] | None = None,
) -> Keys:
  """The keys of an architecture: the shared ones, and those of its own.

  Args:
    defaults: transformers' defaults of the shared keys.
    honoured: The other keys that shape the model; see `Keys`.
    training: The other keys that act only in training.
    fixed: The other keys with only some supported values.
    ignored: The other keys that change nothing, with the reason.
    spellings: Other spellings of keys.
  """
  d = {'num_key_value_heads': None, 'tie_word_embeddings': False, **defaults}
  replaced_keys = {*honoured, *(fixed or {}), *(ignored or {})}
  common = {k: v for k, v in COMMON_FIXED.items() if k not in replaced_keys}
  return Keys(
    honoured={
      'vocab_size': (SIZE, d['vocab_size']),
      'hidden_size': (SIZE, d['hidden_size']),
      'num_hidden_layers': (LAYERS, d['num_hidden_layers']),
      'num_attention_heads': (SIZE, d['num_attention_heads']),
      'num_key_value_heads': (OPTIONAL_SIZE, d['num_key_value_heads']),
      'hidden_act': (str, 'silu'),
      'rms_norm_eps': (POSITIVE, d['rms_norm_eps']),
      'tie_word_embeddings': (bool, d['tie_word_embeddings']),
      'num_experts_per_tok': (SIZE, d['num_experts_per_tok']),
      'max_position_embeddings': (
        OPTIONAL_LENGTH,
        d['max_position_embeddings'],
      ),
      **rotary_keys.KEYS,
      **honoured,
    },
    training={
      'attention_dropout': (
        RATE,
        0.0,
        0.0,
        'our dropout is on residuals and hidden values too; see model.dropout',
      ),
      'router_aux_loss_coef': (AMOUNT, d['router_aux_loss_coef'], ..., ''),
      **(training or {}),
    },
    fixed={**common, 'is_encoder_decoder': (False,), **(fixed or {})},
    ignored={
      **COMMON_IGNORED,
      'initializer_range': 'the parameters are there',
      'pad_token_id': 'masks say what padding is',
      **(ignored or {}),
    },
    spellings=spellings or {},
  )


def problems(
  c: Values,
  *,
  theta: float = 10_000.0,
  rope_types: tuple[str, ...] = ('default', 'yarn'),
  activations: Mapping[str, str] = ACTIVATIONS,
) -> list[str]:
  """A text for each value of the shared keys that is not supported.

  Args:
    c: The values of config.json.
    theta: The base of rotary positions where the config has none.
    rope_types: The rope types that the architecture has.
    activations: Our names of the activations that it has, by theirs.
  """
  return [
    *activation_problems('hidden_act', c.hidden_act, activations),
    *rotary_keys.problems(c, theta, rope_types),
  ]


def options(
  c: Values,
  *,
  ffn_hidden: int,
  num_experts: int,
  router: RouterOptions,
  theta: float = 10_000.0,
  attention: AttentionBase,
  moe: Mapping[str, Any] | None = None,
  activations: Mapping[str, str] = ACTIVATIONS,
) -> DecoderOptions:
  """The options of a model.

  Args:
    c: The values of config.json.
    ffn_hidden: Width of dense feed-forwards, and of experts that have none of
      their own.
    num_experts: Number of experts.
    router: The router.
    theta: The base of rotary positions where the config has none.
    attention: The attention; see `heads` for the usual one.
    moe: Further options of sparse layers; they win over the defaults, by which
      all layers are sparse and no token is dropped.
    activations: Our names of the activations of the architecture, by theirs.
  """
  return DecoderOptions(
    vocab_size=c.vocab_size,
    num_layers=c.num_hidden_layers,
    width=c.hidden_size,
    attention=attention,
    ffn=FfnOptions(ffn_hidden, activations[c.hidden_act]),
    norm=RmsNorm(float(c.rms_norm_eps)),
    positions=rotary_keys.rotary(c, theta),
    embedding=EmbeddingOptions(tie=c.tie_word_embeddings),
    moe=MoeOptions(
      num_experts=num_experts,
      num_selected=c.num_experts_per_tok,
      router=dataclasses.replace(
        cast(Any, router),
        balance_weight=float(c.router_aux_loss_coef),
        z_weight=0.0,
      ),
      **{'layers': 'all', **_DROPLESS, **(moe or {})},
    ),
  )


def heads(c: Values, **overrides: Any) -> AttentionOptions:
  """Attention whose heads have keys and values of their own, or share them.

  Args:
    c: The values of config.json.
    **overrides: Options of attention beside the numbers of heads; without a
      `head_width` the heads multiply to the width.
  """
  return AttentionOptions(
    num_heads=c.num_attention_heads,
    num_kv_heads=c.num_key_value_heads or c.num_attention_heads,
    **{'head_width': c.hidden_size // c.num_attention_heads, **overrides},
  )


def describe(o: DecoderOptions, architecture: str) -> dict[str, Any]:
  """The shared keys of config.json that a model decides.

  Args:
    o: The options of the model.
    architecture: The name of the architecture, for messages.

  Raises:
    ValueError: The model is no decoder with experts and rotary positions.
  """
  if not isinstance(o, DecoderOptions):
    raise InputError('it has an encoder, or no blocks')
  if not o.has_experts:
    raise InputError(f'it is dense; {architecture} has experts')
  attention, moe = o.attention.within(o.width), moe_options(o)
  return dict(
    vocab_size=o.vocab_size,
    hidden_size=o.width,
    num_hidden_layers=o.num_layers,
    num_attention_heads=attention.num_heads,
    num_key_value_heads=getattr(attention, 'num_kv_heads', attention.num_heads),
    hidden_act=their_activation(expert_of(o).activation, ACTIVATIONS),
    rms_norm_eps=o.norm.epsilon,
    tie_word_embeddings=o.embedding.tie,
    num_experts_per_tok=moe.num_selected,
    rope_parameters=rotary_keys.rope_parameters(o.positions),
  )


def plain_heads(o: DecoderOptions) -> AttentionOptions:
  """The options of attention, with defaults for sizes of 0.

  Raises:
    ValueError: The attention is latent.
  """
  return attention_and_moe(o, o.width)[0]


def moe_options(o: DecoderOptions) -> MoeOptions:
  """The options of the sparse layers, with defaults for sizes of 0."""
  return o.moe.within(o.ffn, o.dropout)


def expert_of(o: DecoderOptions) -> FeedForwardExpert:
  """The options of the experts, with defaults for sizes of 0.

  Raises:
    ValueError: The experts are no feed-forwards.
  """
  expert = moe_options(o).expert
  if not isinstance(expert, FeedForwardExpert):
    raise InputError(f'its experts are {type(expert).__name__}')
  return expert


def token_choice(o: DecoderOptions) -> TokenChoice:
  """The router of the sparse layers.

  Raises:
    ValueError: The router is of another kind.
  """
  router = moe_options(o).router
  if not isinstance(router, TokenChoice):
    raise InputError(f'its router is {type(router).__name__}')
  return router


def layers(sparse: Sequence[bool]) -> str:
  """The option `moe.layers`, for a flag for each layer."""
  if all(sparse):
    return 'all'
  return ','.join(str(i) for i, flag in enumerate(sparse) if flag)


def gate_problems(c: Values) -> Iterator[str]:
  """A text if the config's `norm_topk_prob` makes every gate 1."""
  if c.norm_topk_prob and c.num_experts_per_tok == 1:
    yield (
      'num_experts_per_tok=1 with norm_topk_prob=True is not supported: every '
      'gate would be 1'
    )


def gates(c: Values) -> str:
  """The gates that the config's `norm_topk_prob` names."""
  return 'renormalized' if c.norm_topk_prob else 'raw'


def is_renormalized(router: RouterOptions) -> bool:
  """Whether gates of the softmax of all experts are divided by their sum.

  Raises:
    ValueError: The router has other gates.
  """
  flags = {'raw': False, 'renormalized': True}
  gates = getattr(router, 'gates', None)
  if gates not in flags:
    raise InputError(
      f'its router is {type(router).__name__} with gates {gates!r}, not one of '
      f'{sorted(flags)}'
    )
  return flags[gates]
