"""Keys of config.json and names of tensors that transformers' decoders share.

Unless the module of a family says otherwise, decoders have pre-norm blocks with
root mean square norms, rotary positions, keys and values that heads share, and
gated feed-forwards, and drop no token. A key of config.json that several
decoders have means the same in all. The module of a family calls `decoder` with
its keys, its table of names of tensors (`mapping.Names`), and functions for all
else.
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
  COUNT,
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
from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.experts import (
  Dropless,
  FeedForwardExpert,
  SharedExpertOptions,
)
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.routers import RouterOptions, TokenChoice
from moe_jax.models import DecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.routing.capacity import All

# Tables of the names of tensors.


def layer(path: str, *names: tuple[str, str]) -> Names:
  """The entry of a layer's parameter, for a table of names of tensors.

  Args:
    path: The path of our parameter in the layer.
    *names: (name, layout) of alternative tensors; each name gets the prefix
      'model.layers.{layer}.'.
  """
  return {
    f'layer/{path}': tuple(
      Name(f'model.layers.{{layer}}.{name}', form) for name, form in names
    )
  }


def weight(path: str, module: str, form: str) -> Names:
  """The entry of a layer's parameter, for a table of names of tensors.

  Args:
    path: The path of our parameter in the layer.
    module: The module of the checkpoint's layer whose tensor `weight` has the
      parameter's values.
    form: The layout of the tensor, such as 'M' or, if the parameter has the
      axes in another order, 'F M -> M F'.
  """
  return layer(path, (f'{module}.weight', form))


# The tensors that all decoders have: embedding, logits kernel, final norm, and
# in layers the norms before attention and before feed-forwards.
COMMON: Names = {
  'embedding': (Name('model.embed_tokens.weight', 'V M'),),
  'w_logits': (Name('lm_head.weight', 'V M -> M V'),),
  'final_norm/scale': (Name('model.norm.weight', 'M'),),
  **weight('attention_norm/scale', 'input_layernorm', 'M'),
  **weight('ffn_norm/scale', 'post_attention_layernorm', 'M'),
}
# The tensors that all decoders have, and those of attention's projections. In
# layouts, N is the number of heads of keys and values.
DECODER: Names = {
  **COMMON,
  **weight('attention/w_query', 'self_attn.q_proj', '(H D) M -> M H D'),
  **weight('attention/w_key', 'self_attn.k_proj', '(N D) M -> M N D'),
  **weight('attention/w_value', 'self_attn.v_proj', '(N D) M -> M N D'),
  **weight('attention/w_out', 'self_attn.o_proj', 'M (H D) -> H D M'),
  **layer('attention/b_query', ('self_attn.q_proj.bias', '(H D) -> H D')),
  **layer('attention/b_key', ('self_attn.k_proj.bias', '(N D) -> N D')),
  **layer('attention/b_value', ('self_attn.v_proj.bias', '(N D) -> N D')),
  **layer('attention/b_out', ('self_attn.o_proj.bias', 'M')),
}
# The tensors of the norms of each head's queries and keys.
HEAD_NORMS: Names = {
  **weight('attention/query_norm', 'self_attn.q_norm', 'D'),
  **weight('attention/key_norm', 'self_attn.k_norm', 'D'),
}


def gated_ffn(path: str, module: str) -> Names:
  """The table entries of a gated feed-forward's three weights.

  `path` is the feed-forward's path in our layer, `module` its name in theirs.
  """
  return {
    **weight(f'{path}/w_gate', f'{module}.gate_proj', 'F M -> M F'),
    **weight(f'{path}/w_in', f'{module}.up_proj', 'F M -> M F'),
    **weight(f'{path}/w_out', f'{module}.down_proj', 'M F -> F M'),
  }


def router(*modules: str) -> Names:
  """The table entry of routers' kernels.

  `modules` are alternative names of a layer's router in checkpoints.
  """
  names = ((f'{module}.weight', 'E M -> M E') for module in modules)
  return layer('moe/router/w', *names)


def experts(
  module: str = 'mlp.experts',
  gate: str = 'gate_proj',
  up: str = 'up_proj',
  down: str = 'down_proj',
) -> Names:
  """The table entries of gated experts' weights.

  An export writes three tensors for each expert, in `module`. A checkpoint may
  also have them in the module 'mlp.experts', or may have the tensors that
  transformers has in memory, in which experts are stacked, and `gate` and `up`
  are one tensor.

  Args:
    module: The name of the experts' module in files.
    gate: The name of an expert's gate projection in files.
    up: The name of an expert's linear projection in files.
    down: The name of an expert's output projection in files.
  """
  modules = dict.fromkeys((module, 'mlp.experts'))
  table: Names = {}
  for path, projection, form, fused, fused_form in (
    ('w_gate', gate, 'F M -> M F', 'gate_up_proj', 'E (0/2 F) M -> E M F'),
    ('w_in', up, 'F M -> M F', 'gate_up_proj', 'E (1/2 F) M -> E M F'),
    ('w_out', down, 'M F -> F M', 'down_proj', 'E M F -> E F M'),
  ):
    table |= layer(
      f'moe/experts/{path}',
      *((f'{m}.{{expert}}.{projection}.weight', form) for m in modules),
      (f'mlp.experts.{fused}', fused_form),
    )
  return table


# Functions and tables for the keys of config.json.

# Our activations by the names that config.json has for them.
ACTIVATIONS = {
  'silu': 'swiglu',
  'swish': 'swiglu',
  'gelu_pytorch_tanh': 'geglu',
  'gelu_new': 'geglu',
}
WINDOW, FULL = 'sliding_attention', 'full_attention'


def _heads(o: DecoderOptions) -> Any:
  """A decoder's options of attention, with actual sizes for sizes of 0."""
  return o.attention.within(o.width)


def _has_bias(o: DecoderOptions) -> bool:
  """Key `attention_bias`: whether queries, or compressed keys, have a bias."""
  names = 'query', 'kv_down'
  return any(o.attention.has_bias(name, use_bias=False) for name in names)


def _router(o: DecoderOptions, name: str, default: Any) -> Any:
  return getattr(o.moe.router, name, default)


# The keys that say which layers are sparse.
_SPARSE_KEYS = (
  'first_k_dense_replace',
  'moe_layer_freq',
  'moe_layer_interval',
  'decoder_sparse_step',
  'mlp_only_layers',
)
# The keys for the number of experts; config.json may have any of these.
_NUM_EXPERTS = ('num_experts', 'num_local_experts', 'n_routed_experts')
# For each key that several decoders have, the type of its values, and the
# function from a model's options to the key's value. For options that no such
# decoder can have the function gives a default; an export, which reads its
# config.json back, then finds the difference from the model, and reports it.
_SHARED: Mapping[str, tuple[Any, Callable[[DecoderOptions], Any]]] = {
  'vocab_size': (SIZE, lambda o: o.vocab_size),
  'hidden_size': (SIZE, lambda o: o.width),
  'num_hidden_layers': (LAYERS, lambda o: o.num_layers),
  'num_attention_heads': (SIZE, lambda o: _heads(o).num_heads),
  'num_key_value_heads': (
    OPTIONAL_SIZE,
    lambda o: getattr(_heads(o), 'num_kv_heads', _heads(o).num_heads),
  ),
  'head_dim': (OPTIONAL_SIZE, lambda o: plain_heads(o).head_width),
  'attention_bias': (bool, _has_bias),
  'sliding_window': (OPTIONAL_LENGTH, lambda o: o.attention.window or None),
  'use_sliding_window': (bool, lambda o: any(o.windows)),
  'layer_types': (
    list | None,
    lambda o: [WINDOW if window else FULL for window in o.windows],
  ),
  'intermediate_size': (SIZE, lambda o: o.ffn.hidden),
  'moe_intermediate_size': (SIZE, lambda o: expert_of(o).hidden),
  'rms_norm_eps': (POSITIVE, lambda o: o.norm.epsilon),
  'tie_word_embeddings': (bool, lambda o: o.embedding.tie),
  'num_experts_per_tok': (SIZE, lambda o: o.moe.num_selected),
  **dict.fromkeys(_NUM_EXPERTS, (SIZE, lambda o: o.moe.num_experts)),
  'n_shared_experts': (
    COUNT,
    lambda o: o.moe.shared_expert.hidden // expert_of(o).hidden,
  ),
  'first_k_dense_replace': (COUNT, lambda o: o.sparse.index(True)),
  'n_group': (OPTIONAL_SIZE, lambda o: _router(o, 'expert_groups', 1)),
  'topk_group': (
    OPTIONAL_SIZE,
    lambda o: _router(o, 'chosen_expert_groups', 1),
  ),
  'routed_scaling_factor': (POSITIVE, lambda o: _router(o, 'gate_scale', 1.0)),
  'norm_topk_prob': (bool, lambda o: 'renormalized' in _router(o, 'gates', '')),
}
# transformers' default, in most decoders, of each key that every decoder has.
_DEFAULTS: Mapping[str, Any] = dict(
  vocab_size=32000,
  hidden_size=4096,
  num_hidden_layers=32,
  num_attention_heads=32,
  num_key_value_heads=None,
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  num_experts_per_tok=2,
  max_position_embeddings=2048,
  router_aux_loss_coef=0.001,
)


# Jitter, a training key: its type, default, neutral value and reason.
JITTER = (
  RATE,
  0.0,
  0.0,
  'it multiplies what the experts see too; see moe.jitter for the router',
)


def keys(
  defaults: Mapping[str, Any],
  honoured: Mapping[str, tuple[Any, Any]] | None = None,
  training: Mapping[str, tuple[Any, Any, Any, str]] | None = None,
  fixed: Mapping[str, tuple[Any, ...]] | None = None,
  ignored: Iterable[str] = (),
  spellings: Mapping[str, str] | None = None,
) -> Keys:
  """The keys of an architecture: those that decoders share, and its own.

  Args:
    defaults: transformers' defaults of the architecture's shared keys that not
      every decoder has, or whose default is not that of most decoders.
    honoured: The architecture's own keys that shape the model. The values of
      this and the next two arguments are as in `Keys`.
    training: Its own keys that act only in training.
    fixed: Its own keys of which only some values are supported.
    ignored: Its own keys that change nothing.
    spellings: Other spellings of keys, each with the key that it stands for.
  """
  values = {**_DEFAULTS, **defaults}
  balance_weight = values.pop('router_aux_loss_coef')
  longest = values.pop('max_position_embeddings')
  all_honoured = {
    **{name: (_SHARED[name][0], value) for name, value in values.items()},
    'hidden_act': (str, 'silu'),
    'max_position_embeddings': (OPTIONAL_LENGTH, longest),
    **rotary_keys.KEYS,
    **(honoured or {}),
  }
  replaced_keys = {*all_honoured, *(fixed or {}), *ignored}
  common = {k: v for k, v in COMMON_FIXED.items() if k not in replaced_keys}
  number = next(name for name in _NUM_EXPERTS if name in all_honoured)
  other_numbers = [name for name in _NUM_EXPERTS if name != number]
  return Keys(
    honoured=all_honoured,
    training={
      'attention_dropout': (
        RATE,
        0.0,
        0.0,
        'our dropout is on residuals and hidden values too; see model.dropout',
      ),
      'router_aux_loss_coef': (AMOUNT, balance_weight, ..., ''),
      **(training or {}),
    },
    fixed={**common, 'is_encoder_decoder': (False,), **(fixed or {})},
    # `initializer_range` does not matter, as a checkpoint has all parameters;
    # `pad_token_id` does not, as masks say which tokens are padding.
    ignored=(*COMMON_IGNORED, 'initializer_range', 'pad_token_id', *ignored),
    spellings={**dict.fromkeys(other_numbers, number), **(spellings or {})},
  )


def _problems(
  c: Values,
  rope: Mapping[str, Any],
  rope_types: tuple[str, ...],
  activations: Mapping[str, str],
  sparse: Sequence[bool],
) -> Iterator[str]:
  """A text for each value of the shared keys that is not supported.

  The architecture has the rotary parameters `rope` where the config has none,
  these `rope_types`, and our `activations` by their names in config.json.
  `sparse` says of each layer whether it is sparse.
  """
  yield from activation_problems('hidden_act', c.hidden_act, activations)
  yield from rotary_keys.problems(c, rope, rope_types)
  if not any(sparse):
    found = [f'{k}={getattr(c, k)}' for k in _SPARSE_KEYS if hasattr(c, k)]
    yield f'{" and ".join(found)}: none of {len(sparse)} layers is sparse'
  if not hasattr(c, 'layer_types'):
    return
  kinds = layer_types(c)
  for kind in kinds:
    if kind not in (WINDOW, FULL):
      yield f'layer_types has {kind!r:.80}, neither {WINDOW} nor {FULL}'
  if len(kinds) != c.num_hidden_layers:
    yield (
      f'layer_types has {len(kinds)} layers, num_hidden_layers='
      f'{c.num_hidden_layers}'
    )


def behind_dense(c: Values) -> Sequence[bool]:
  """Whether each layer is sparse, where only the first ones may be dense."""
  first_sparse = getattr(c, 'first_k_dense_replace', 0)
  return [i >= first_sparse for i in range(c.num_hidden_layers)]


def gate_problems(c: Values) -> Iterator[str]:
  """A text if a token's single gate would be divided by itself, so always 1."""
  if c.num_experts_per_tok == 1 and getattr(c, 'norm_topk_prob', True):
    flag = ' with norm_topk_prob=True' * hasattr(c, 'norm_topk_prob')
    yield (
      f'num_experts_per_tok=1{flag} is not supported: every gate would be 1'
    )


def layer_types(c: Values) -> list[Any]:
  """The kind of each layer's attention, `WINDOW` or `FULL`.

  Without the key `layer_types`, every second layer below `max_window_layers`,
  from the first on, attends to a window.
  """
  if c.layer_types is not None:
    return c.layer_types
  L = c.num_hidden_layers
  last = getattr(c, 'max_window_layers', L) if _has_windows(c) else 0
  return [FULL if i % 2 or i >= last else WINDOW for i in range(L)]


def _has_windows(c: Values) -> bool:
  return getattr(c, 'use_sliding_window', True)


def heads(c: Values, **overrides: Any) -> AttentionOptions:
  """The options of attention in which heads may share keys and values.

  Without the key `head_dim` a head's width is the model's width divided by the
  number of heads.

  Args:
    c: The values of config.json.
    **overrides: Options of attention that shared keys do not decide.
  """
  keys: dict[str, Any] = {}
  if hasattr(c, 'attention_bias'):
    keys['biases'] = 'all' if c.attention_bias else 'none'
  if hasattr(c, 'sliding_window') and _has_windows(c):
    keys['window'] = c.sliding_window or 0
    if hasattr(c, 'layer_types'):
      full = [kind == FULL for kind in layer_types(c)]
      if all(full):
        keys['window'] = 0
      else:
        keys['full_layers'] = layers(full)
  head_width = getattr(c, 'head_dim', None)
  return AttentionOptions(
    num_heads=c.num_attention_heads,
    num_kv_heads=c.num_key_value_heads or c.num_attention_heads,
    head_width=head_width or c.hidden_size // c.num_attention_heads,
    **keys | overrides,
  )


def _options(
  c: Values,
  rope: Mapping[str, Any],
  activations: Mapping[str, str],
  sparse: Sequence[bool],
  *,
  router: RouterOptions | None = None,
  losses: Mapping[str, float] | None = None,
  moe: Mapping[str, Any] | None = None,
  **overrides: Any,
) -> DecoderOptions:
  """The options of a decoder, from the values of its config.json.

  Args:
    c: The values of config.json.
    rope: The parameters of rotary positions where the config has none.
    activations: Our names of the architecture's activations, by the names in
      config.json.
    sparse: Whether each layer is sparse.
    router: The router's options, except for its losses; None is a router whose
      gates are probabilities among all experts, divided by their sum unless
      `norm_topk_prob` is false.
    losses: Weights of losses of the router, if they differ from the balance
      loss of `router_aux_loss_coef` alone.
    moe: Further options of sparse layers. They override shared keys and the
      default, by which no token is dropped.
    **overrides: Further options of the model, which override shared keys.
  """
  if router is None:
    renormalized = getattr(c, 'norm_topk_prob', True)
    router = TokenChoice(gates='renormalized' if renormalized else 'raw')
  weights = {'balance_weight': float(c.router_aux_loss_coef), 'z_weight': 0.0}
  router = dataclasses.replace(
    cast(Any, router), **{**weights, **(losses or {})}
  )
  sparse_layers: dict[str, Any] = dict(
    num_experts=next(
      getattr(c, name) for name in _NUM_EXPERTS if hasattr(c, name)
    ),
    num_selected=c.num_experts_per_tok,
    layers=layers(sparse),
    router=router,
    capacity=All(),
    dispatch=Dropless(),
  )
  if hasattr(c, 'moe_intermediate_size'):
    sparse_layers['expert'] = FeedForwardExpert(hidden=c.moe_intermediate_size)
  if num_shared := getattr(c, 'n_shared_experts', None):
    hidden = num_shared * c.moe_intermediate_size
    sparse_layers['shared_expert'] = SharedExpertOptions(hidden=hidden)
  model: dict[str, Any] = dict(
    vocab_size=c.vocab_size,
    num_layers=c.num_hidden_layers,
    width=c.hidden_size,
    ffn=FfnOptions(c.intermediate_size, activations[c.hidden_act]),
    norm=RmsNorm(float(c.rms_norm_eps)),
    embedding=EmbeddingOptions(tie=c.tie_word_embeddings),
    moe=MoeOptions(**sparse_layers | dict(moe or {})),
  )
  model = model | overrides
  if 'attention' not in model:
    model['attention'] = heads(c)
  if 'positions' not in model:
    model['positions'] = rotary_keys.rotary(c, rope)
  return DecoderOptions(**model)


def _describe(
  o: DecoderOptions, keys: Keys, activations: Mapping[str, str]
) -> dict[str, Any]:
  """The values of the shared keys of config.json for a model's options.

  `keys` are the architecture's, `activations` ours by names in config.json.

  Raises:
    ValueError: The model is no decoder, or its heads or experts are not of the
      kinds that transformers' decoders have.
  """
  if not isinstance(o, DecoderOptions) or o.has_encoder:
    raise InputError('it has an encoder, or no blocks')
  expert = expert_of(o)
  decided = {
    key: value(o) for key, (_, value) in _SHARED.items() if key in keys.honoured
  }
  # Without a key for the experts' width, `intermediate_size` is that width.
  if 'moe_intermediate_size' not in keys.honoured:
    decided['intermediate_size'] = expert.hidden
  return decided | dict(
    hidden_act=their_activation(expert.activation, activations),
    rope_parameters=rotary_keys.rope_parameters(o.positions),
  )


def plain_heads(o: DecoderOptions) -> AttentionOptions:
  """Attention's options, with actual sizes; ValueError if it is latent."""
  return plain_attention(o, o.width)


def expert_of(o: DecoderOptions) -> FeedForwardExpert:
  """The options of the experts; sizes of 0 are those of dense feed-forwards.

  Raises:
    ValueError: The experts are no feed-forwards.
  """
  expert = o.moe.within(o.ffn, o.dropout).expert
  if not isinstance(expert, FeedForwardExpert):
    raise InputError(f'its experts are {type(expert).__name__}')
  return expert


def decoder(
  model_type: str,
  stem: str,
  keys: Keys,
  names: Names,
  *,
  options: Callable[[Values], Mapping[str, Any]] = lambda c: {},
  describe: Callable[[DecoderOptions], Mapping[str, Any]] = lambda o: {},
  problems: Callable[[Values], Iterable[str]] = gate_problems,
  sparse: Callable[[Values], Sequence[bool]] = behind_dense,
  rope: Mapping[str, Any] = rotary_keys.ROPE,
  rope_types: tuple[str, ...] = ('default', 'yarn'),
  activations: Mapping[str, str] = ACTIVATIONS,
  **overrides: Any,
) -> Architecture:
  """The architecture of a decoder with rotary positions.

  Args:
    model_type: The architecture's name in config.json.
    stem: Beginning of the names of its classes, such as 'Mixtral'.
    keys: The keys of config.json.
    names: The table of names of tensors, by the paths of our variables.
    options: Returns what sets the architecture's models apart, as keyword
      arguments of `_options`: `router`, `losses`, `moe`, options of the model.
    describe: Returns, by key, the values of the architecture's own keys for a
      model. A key that is another spelling of a shared key replaces it.
    problems: Returns a text for each value of the architecture's own keys that
      our models cannot express.
    sparse: Returns for each layer whether it is sparse, which has to work for
      unsupported values as well.
    rope: The parameters of rotary positions where the config has none. It has
      `partial_rotary_factor` only if configs may rotate a part of each head.
    rope_types: The rope types that the architecture has.
    activations: Our names of the architecture's activations, by the names in
      config.json.
    **overrides: Attributes of `Architecture` whose values differ from most
      decoders'.
  """

  def all_described(o):
    shared = _describe(o, keys, activations)
    own = describe(o)
    respelled = {keys.spellings.get(key) for key in own}
    return {k: v for k, v in shared.items() if k not in respelled} | {**own}

  decoder_attributes: dict[str, Any] = dict(
    classes=(f'{stem}ForCausalLM', f'{stem}Model'),
    suits=lambda o: not o.has_encoder,
    prefix='model.',
    computed_tensors=(r'rotary_emb\.inv_freq$',),
  )
  return Architecture(
    model_type=model_type,
    keys=keys,
    problems=lambda c: [
      *_problems(c, rope, rope_types, activations, sparse(c)),
      *problems(c),
    ],
    options=lambda c: _options(c, rope, activations, sparse(c), **options(c)),
    describe=all_described,
    names=names,
    **{**decoder_attributes, **overrides},
  )
