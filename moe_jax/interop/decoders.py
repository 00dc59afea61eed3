"""Keys of config.json and names of tensors that transformers' decoders share.

These decoders have pre-norm blocks with root mean square norms, rotary
positions, grouped keys and gated feed-forwards, and drop no token. Functions
for names return a part of an architecture's table (`mapping.Names`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from moe_jax.errors import InputError
from moe_jax.interop import rotary_keys
from moe_jax.interop.architecture import (
  Architecture,
  activation_problems,
  layers,
  plain_attention,
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
from moe_jax.interop.mapping import Name, Names
from moe_jax.layers.attention import (
  AttentionBase,
  AttentionOptions,
  LatentOptions,
)
from moe_jax.layers.experts import Dropless, FeedForwardExpert
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.routers import RouterOptions, TokenChoice
from moe_jax.models import DecoderOptions, ModelOptions
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.routing.capacity import All

Table = dict[str, tuple[Name, ...]]

# The embedding, the head and the norm before it.
ENDS: Table = {
  'embedding': (Name('model.embed_tokens.weight', 'V M'),),
  'w_logits': (Name('lm_head.weight', 'V M -> M V'),),
  'final_norm/scale': (Name('model.norm.weight', 'M'),),
}


def layer(path: str, *names: Name) -> Table:
  """A parameter of a layer, whose names begin behind the layer's."""
  return {
    f'layer/{path}': tuple(
      name._replace(template=f'model.layers.{{layer}}.{name.template}')
      for name in names
    )
  }


def weight(path: str, module: str, form: str) -> Table:
  """The weight of a module of a layer."""
  return layer(path, Name(f'{module}.weight', form))


# The norms before attention and before feed-forwards.
NORMS: Table = {
  **weight('attention_norm/scale', 'input_layernorm', 'M'),
  **weight('ffn_norm/scale', 'post_attention_layernorm', 'M'),
}
# Norms, and the projections of attention.
BLOCK: Table = {
  **NORMS,
  **weight('attention/w_query', 'self_attn.q_proj', '(H D) M -> M H D'),
  **weight('attention/w_key', 'self_attn.k_proj', '(N D) M -> M N D'),
  **weight('attention/w_value', 'self_attn.v_proj', '(N D) M -> M N D'),
  **weight('attention/w_out', 'self_attn.o_proj', 'M (H D) -> H D M'),
  **layer('attention/b_query', Name('self_attn.q_proj.bias', '(H D) -> H D')),
  **layer('attention/b_key', Name('self_attn.k_proj.bias', '(N D) -> N D')),
  **layer('attention/b_value', Name('self_attn.v_proj.bias', '(N D) -> N D')),
  **layer('attention/b_out', Name('self_attn.o_proj.bias', 'M')),
}


def gated_ffn(path: str, module: str) -> Table:
  """The weights of a gated feed-forward."""
  return {
    **weight(f'{path}/w_gate', f'{module}.gate_proj', 'F M -> M F'),
    **weight(f'{path}/w_in', f'{module}.up_proj', 'F M -> M F'),
    **weight(f'{path}/w_out', f'{module}.down_proj', 'M F -> F M'),
  }


def experts(
  module: str = 'mlp.experts',
  gate: str = 'gate_proj',
  up: str = 'up_proj',
  down: str = 'down_proj',
) -> Table:
  """Gated experts, each with tensors of its own in files that are written.

  Files may also have the tensors that transformers has in memory, in which
  experts are stacked and gate and up are one tensor, or the names of those
  tensors for each expert.

  Args:
    module: The name of the experts in files.
    gate: The name of an expert's gate in files; `up` and `down` likewise.
  """

  modules = dict.fromkeys((module, 'mlp.experts'))
  table: Table = {}
  for path, projection, form, fused, fused_form in (
    ('w_gate', gate, 'F M -> M F', 'gate_up_proj', 'E (0/2 F) M -> E M F'),
    ('w_in', up, 'F M -> M F', 'gate_up_proj', 'E (1/2 F) M -> E M F'),
    ('w_out', down, 'M F -> F M', 'down_proj', 'E M F -> E F M'),
  ):
    table |= layer(
      f'moe/experts/{path}',
      *(Name(f'{m}.{{expert}}.{projection}.weight', form) for m in modules),
      Name(f'mlp.experts.{fused}', fused_form),
    )
  return table


ACTIVATIONS = {
  'silu': 'swiglu',
  'swish': 'swiglu',
  'gelu_pytorch_tanh': 'geglu',
  'gelu_new': 'geglu',
}


# The names that the number of experts has.
_NUM_EXPERTS = ('num_experts', 'num_local_experts', 'n_routed_experts')


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
  router: RouterOptions,
  attention: AttentionBase,
  *,
  losses: Mapping[str, float] | None = None,
  theta: float = 10_000.0,
  moe: Mapping[str, Any] | None = None,
  activations: Mapping[str, str] = ACTIVATIONS,
  **overrides: Any,
) -> DecoderOptions:
  """The options of a model.

  Args:
    c: The values of config.json.
    router: The router, but for its losses.
    attention: The attention; see `heads` for the usual one.
    losses: Weights of losses of the router, if they differ from the balance
      loss of `router_aux_loss_coef` alone.
    theta: The base of rotary positions where the config has none.
    moe: Further options of sparse layers; they win over the defaults, by which
      all layers are sparse and no token is dropped.
    activations: Our names of the activations of the architecture, by theirs.
    **overrides: Further options of the model, which win over the shared keys.
  """
  weights = {'balance_weight': float(c.router_aux_loss_coef), 'z_weight': 0.0}
  weights |= losses or {}
  moe = {'layers': 'all', 'capacity': All(), 'dispatch': Dropless()} | (
    dict(moe or {})
  )
  if hasattr(c, 'moe_intermediate_size'):
    moe['expert'] = FeedForwardExpert(hidden=c.moe_intermediate_size)
  model: dict[str, Any] = dict(
    vocab_size=c.vocab_size,
    num_layers=c.num_hidden_layers,
    width=c.hidden_size,
    attention=attention,
    ffn=FfnOptions(c.intermediate_size, activations[c.hidden_act]),
    norm=RmsNorm(float(c.rms_norm_eps)),
    positions=rotary_keys.rotary(c, theta),
    embedding=EmbeddingOptions(tie=c.tie_word_embeddings),
    moe=MoeOptions(
      num_experts=next(
        getattr(c, name) for name in _NUM_EXPERTS if hasattr(c, name)
      ),
      num_selected=c.num_experts_per_tok,
      router=dataclasses.replace(cast(Any, router), **weights),
      **moe,
    ),
  )
  return DecoderOptions(**model | overrides)


def heads(c: Values, **overrides: Any) -> AttentionOptions:
  """Attention whose heads have keys and values of their own, or share them.

  Args:
    c: The values of config.json.
    **overrides: Options of attention beside the numbers and widths of heads;
      without a `head_dim` the heads multiply to the width.
  """
  if hasattr(c, 'attention_bias'):
    biases = 'all' if c.attention_bias else 'none'
    overrides = {'biases': biases, **overrides}
  head_width = getattr(c, 'head_dim', None)
  return AttentionOptions(
    num_heads=c.num_attention_heads,
    num_kv_heads=c.num_key_value_heads or c.num_attention_heads,
    head_width=head_width or c.hidden_size // c.num_attention_heads,
    **overrides,
  )


def describe(
  o: DecoderOptions, architecture: str, keys: Keys, *, latent: bool = False
) -> dict[str, Any]:
  """The shared keys of config.json that a model decides.

  Args:
    o: The options of the model.
    architecture: The name of the architecture, for messages.
    keys: The keys of the architecture; others are left out.
    latent: Whether its attention is latent.

  Raises:
    ValueError: The model is no decoder with experts and rotary positions, or
      its attention is of the other kind.
  """
  if not isinstance(o, DecoderOptions) or o.has_encoder:
    raise InputError('it has an encoder, or no blocks')
  if not o.has_experts:
    raise InputError(f'it is dense; {architecture} has experts')
  if latent and not isinstance(o.attention, LatentOptions):
    raise InputError(f'its attention is not latent; that of {architecture} is')
  attention: Any = o.attention if latent else plain_heads(o)
  expert = expert_of(o)
  decided = dict(
    vocab_size=o.vocab_size,
    hidden_size=o.width,
    num_hidden_layers=o.num_layers,
    num_attention_heads=attention.num_heads,
    num_key_value_heads=getattr(attention, 'num_kv_heads', attention.num_heads),
    head_dim=None if latent else attention.head_width,
    attention_bias=attention.has_bias(
      'kv_down' if latent else 'query', use_bias=False
    ),
    sliding_window=attention.window or None,
    hidden_act=their_activation(expert.activation, ACTIVATIONS),
    # Experts have a width of their own beside dense feed-forwards.
    intermediate_size=(
      o.ffn if 'moe_intermediate_size' in keys.honoured else expert
    ).hidden,
    moe_intermediate_size=expert.hidden,
    rms_norm_eps=o.norm.epsilon,
    tie_word_embeddings=o.embedding.tie,
    num_experts_per_tok=o.moe.num_selected,
    rope_parameters=rotary_keys.rope_parameters(o.positions),
    **dict.fromkeys(_NUM_EXPERTS, o.moe.num_experts),
  )
  return {key: v for key, v in decided.items() if key in keys.honoured}


def plain_heads(o: DecoderOptions) -> AttentionOptions:
  """The options of attention, which is not latent; see `plain_attention`."""
  return plain_attention(o, o.width)


def expert_of(o: DecoderOptions) -> FeedForwardExpert:
  """The options of the experts, with defaults for sizes of 0.

  Raises:
    ValueError: The experts are no feed-forwards.
  """
  expert = o.moe.within(o.ffn, o.dropout).expert
  if not isinstance(expert, FeedForwardExpert):
    raise InputError(f'its experts are {type(expert).__name__}')
  return expert


def token_choice(o: DecoderOptions) -> TokenChoice:
  """The router of the sparse layers.

  Raises:
    ValueError: The router is of another kind.
  """
  router = o.moe.router
  if not isinstance(router, TokenChoice):
    raise InputError(f'its router is {type(router).__name__}')
  return router


def gate_problems(c: Values) -> Iterator[str]:
  """A text if gates are divided by their sum, and a token has a single one."""
  if c.num_experts_per_tok == 1 and getattr(c, 'norm_topk_prob', True):
    flag = ' with norm_topk_prob=True' * hasattr(c, 'norm_topk_prob')
    yield (
      f'num_experts_per_tok=1{flag} is not supported: every gate would be 1'
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


WINDOW, FULL = 'sliding_attention', 'full_attention'


def window_problems(kinds: Sequence[Any], num_layers: int) -> Iterator[str]:
  """A text for each unknown kind of a layer, and one for a wrong number.

  Args:
    kinds: The value of `layer_types`, or the kinds that other keys decide.
    num_layers: The number of layers.
  """
  for kind in kinds:
    if kind not in (WINDOW, FULL):
      yield f'layer_types has {kind!r:.80}, neither {WINDOW} nor {FULL}'
  if len(kinds) != num_layers:
    yield (
      f'layer_types has {len(kinds)} layers, num_hidden_layers={num_layers}'
    )


def window_options(kinds: Sequence[str], window: int) -> dict[str, Any]:
  """The options of attention for kinds of layers without problems.

  Args:
    kinds: The kind of each layer.
    window: The number of tokens in the window, the token itself included.
  """
  full = [kind == FULL for kind in kinds]
  if all(full):
    return dict(window=0)
  return dict(window=window, full_layers=layers(full))


def layer_types(o: DecoderOptions) -> list[str]:
  """The value of `layer_types` for a model."""
  return [WINDOW if window else FULL for window in o.windows]


def decoder(
  model_type: str,
  stem: str,
  keys: Keys,
  problems: Callable[[Values], Iterable[str]],
  options: Callable[[Values], ModelOptions],
  describe: Callable[[Any], dict[str, Any]],
  names: Names,
  **overrides: Any,
) -> Architecture:
  """The architecture of a decoder with rotary positions.

  Args:
    model_type: The name in config.json; see `Architecture`, also for the rest.
    stem: Beginning of the names of its classes, such as 'Mixtral'.
    keys: The keys of config.json.
    problems: Returns a text for each value that our models cannot express.
    options: Returns the options of the model.
    describe: Returns the keys of config.json that a model decides.
    names: The tensors of our variables.
    **overrides: Attributes of `Architecture` with other values than those of
      most decoders.
  """
  decoder_attributes: dict[str, Any] = dict(
    classes=(f'{stem}ForCausalLM', f'{stem}Model'),
    suits=lambda o: not o.has_encoder,
    prefix='model.',
    computed_tensors=(r'rotary_emb\.inv_freq$',),
  )
  return Architecture(
    model_type=model_type,
    keys=keys,
    problems=lambda c: list(problems(c)),
    options=options,
    describe=describe,
    names=names,
    **{**decoder_attributes, **overrides},
  )
