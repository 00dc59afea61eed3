"""The description of an architecture of transformers."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop.config_keys import Keys, Values
from moe_jax.interop.mapping import Names
from moe_jax.interop.tensor_files import TensorFiles
from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models import ModelOptions
from moe_jax.models.transformer_options import StackOptions

# Our names of the activations of feed-forwards that have no gate.
ACTIVATIONS = {
  'relu': 'relu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


def _no_id(options: ModelOptions) -> None:
  """Returns None: every token has a position of its own."""
  del options


def _no_patterns(values: Values) -> tuple[str, ...]:
  """Returns no pattern: every tensor is a part of the model."""
  del values
  return ()


@dataclasses.dataclass(frozen=True)
class Architecture:
  """An architecture of transformers, a `model_type`.

  Attributes:
    model_type: The name in config.json.
    classes: The names that `architectures` may have; the first is written.
    keys: The keys of config.json.
    problems: Returns a text for each value of the keys that our models cannot
      express.
    options: Returns the options of the model for values without problems.
    describe: Returns the keys of config.json that the options of a model
      decide; raises ValueError if the architecture has no such model.
    suits: Returns whether a model that was not imported is exported as this
      architecture.
    names: The tensors of our variables; see `mapping`.
    borrowed_type: The `model_type` of its config.json where that is the name of
      another architecture, so that `architectures` must name its class.
    needs_code: Whether transformers has no class for it, so that checkpoints
      bring their own code.
    prefix: Prefix of tensor names that a model without head does not have.
    computed_tensors: Patterns of the names of tensors that need not be read, as
      their values are computed.
    skipped_tensors: Returns the patterns of the names of tensors that are no
      part of the model, for the values of the keys.
    fills_gaps: Whether the checkpoints were trained to fill gaps in text that
      are marked by sentinels (T5).
    files: Opens the tensors in the files of a folder.
    unnumbered_id: Returns the id of the tokens that have no position of their
      own; None if all tokens have one.
  """

  model_type: str
  classes: tuple[str, ...]
  keys: Keys
  problems: Callable[[Values], list[str]]
  options: Callable[[Values], ModelOptions]
  describe: Callable[[Any], dict[str, Any]]
  suits: Callable[[Any], bool]
  names: Names
  borrowed_type: str = ''
  needs_code: bool = False
  prefix: str = ''
  computed_tensors: tuple[str, ...] = ()
  skipped_tensors: Callable[[Values], tuple[str, ...]] = _no_patterns
  fills_gaps: bool = False
  files: Callable[[pathlib.Path], TensorFiles] = TensorFiles
  unnumbered_id: Callable[[Any], int | None] = _no_id


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


def activation_problems(
  key: str, name: str, table: Mapping[str, str]
) -> list[str]:
  """The problem of an activation that is not in `table`, or an empty list."""
  if name in table:
    return []
  return [f'{key}={name!r} is not supported, only {sorted(table)}']


def their_activation(name: str, table: Mapping[str, str]) -> str:
  """The first name that `table` has for our activation, or else our name."""
  return next((theirs for theirs, ours in table.items() if ours == name), name)


def attention_and_moe(
  stack: StackOptions, width: int
) -> tuple[AttentionOptions, MoeOptions]:
  """Attention and experts of a stack, with defaults for sizes of 0.

  Raises:
    ValueError: The attention is latent.
  """
  attention = stack.attention.within(width)
  if not isinstance(attention, AttentionOptions):
    raise InputError('its attention is not that of heads of their own')
  return attention, stack.moe.within(stack.ffn, stack.dropout)


def layers(num_layers: int, step: int, first: int) -> str:
  """The option `moe.layers` for the layers that are sparse; see `is_sparse`."""
  sparse = [i for i in range(num_layers) if is_sparse(i, step, first)]
  if len(sparse) in (0, num_layers):
    return 'all' if sparse else 'none'
  return ','.join(map(str, sparse))


def period(sparse: tuple[bool, ...], first: int) -> int | None:
  """The step under which layers are sparse; see `is_sparse`.

  Args:
    sparse: Whether each layer is sparse.
    first: 0 as NLLB counts, 1 as Switch does.

  Returns:
    The step; None if no step gives these layers.
  """
  for step in range(len(sparse) + 2):
    if tuple(is_sparse(i, step, first) for i in range(len(sparse))) == sparse:
      return step
  return None


def is_sparse(layer: int, step: int, first: int) -> bool:
  """Whether a layer is sparse, where one in every `step` layers is.

  Args:
    layer: The number of the layer, from 0.
    step: The number of layers of which one is sparse; with 0 no layer is.
    first: 0 if the first sparse layer is step - 1, as NLLB counts; 1 if it is
      layer 1, as Switch counts.
  """
  if step <= 1:
    return step == 1
  return layer % step == (1 if first else step - 1)
