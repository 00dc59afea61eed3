"""The facts on an architecture of transformers that imports and exports use."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop.config_keys import Keys, Values
from moe_jax.interop.mapping import Names
from moe_jax.interop.tensor_files import TensorFiles
from moe_jax.layers.attention import AttentionOptions
from moe_jax.models import ModelOptions
from moe_jax.models.layer_options import StackOptions

# Our activations of feed-forwards without a gate, by transformers' names.
ACTIVATIONS = {
  'relu': 'relu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """An architecture of transformers, a `model_type`.

  Attributes:
    model_type: The name in config.json.
    classes: The names that the key `architectures` of config.json may hold; an
      export writes the first.
    keys: The keys of config.json, sorted by treatment.
    problems: Returns, for the values of the keys, a text for each one that our
      models cannot express.
    options: Returns the options of the model, for values in which `problems`
      finds no problem.
    describe: Returns, for the options of a model, the keys of config.json that
      they decide with their values; raises ValueError if the architecture has
      no such model.
    suits: Returns, for the options of a model that was not imported, whether it
      may be exported as this architecture.
    names: The table of names of tensors, by the paths of our variables.
    borrowed_type: The `model_type` in config.json if checkpoints use the name
      of another architecture, so that `architectures` must name the class.
    needs_code: Whether transformers has no class for the architecture, so that
      checkpoints bring their own code.
    prefix: The prefix of tensor names that is absent in checkpoints of a model
      without its head.
    computed_tensors: Patterns of the names of tensors that need not be read, as
      their values are computed.
    skipped_tensors: Returns, for the values of the keys, the patterns of the
      names of tensors that are no part of the model.
    fills_gaps: Whether the checkpoints were trained to fill gaps in text that
      are marked by sentinels (T5).
    files: Opens the tensors in the files of a folder, which is its argument.
    unnumbered_id: Returns, for the options of a model, the id of tokens that
      have no position of their own; None if all tokens have a position.
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
  skipped_tensors: Callable[[Values], tuple[str, ...]] = lambda values: ()
  fills_gaps: bool = False
  files: Callable[[pathlib.Path], TensorFiles] = TensorFiles
  unnumbered_id: Callable[[Any], int | None] = lambda options: None


def activation_problems(
  key: str, name: str, table: Mapping[str, str]
) -> list[str]:
  """The problem, in a list, of a value of `key` that is not in `table`.

  `name` is the value, and `table` has our activations by transformers' names.
  """
  if name in table:
    return []
  return [f'{key}={name!r} is not supported, only {sorted(table)}']


def their_activation(name: str, table: Mapping[str, str]) -> str:
  """transformers' first name for our activation `name`; else `name` itself.

  `table` has our activations by transformers' names.
  """
  return next((theirs for theirs, ours in table.items() if ours == name), name)


def plain_attention(stack: StackOptions, width: int) -> AttentionOptions:
  """A stack's options of attention, for exports whose attention is not latent.

  Sizes of 0 are replaced by actual ones, from `width`, the width M of a model.

  Raises:
    ValueError: The attention is latent.
  """
  attention = stack.attention.within(width)
  if not isinstance(attention, AttentionOptions):
    raise InputError('its attention is not that of heads of their own')
  return attention


def layers(sparse: Sequence[bool]) -> str:
  """Names the sparse layers as the option `moe.layers`: 'all', 'none' or '1,3'.

  `sparse` says of each layer whether it is sparse.
  """
  if all(sparse) or not any(sparse):
    return 'all' if any(sparse) else 'none'
  return ','.join(str(i) for i, flag in enumerate(sparse) if flag)


def sparse_flags(num_layers: int, step: int, first: int) -> tuple[bool, ...]:
  """Whether each layer is sparse, where one in every `step` layers is.

  Args:
    num_layers: The number of layers.
    step: The number of layers of which one is sparse; with 0 no layer is.
    first: 0 if the first sparse layer is step - 1, as NLLB counts; 1 if it is
      layer 1, as Switch counts.
  """
  if step <= 1:
    return (step == 1,) * num_layers
  remainder = 1 if first else step - 1
  return tuple(i % step == remainder for i in range(num_layers))


def period(sparse: tuple[bool, ...], first: int) -> int:
  """Finds n if one in n layers is sparse; 0 if none is.

  `first` is 0 if the first sparse layer is n - 1, and 1 if it is layer 1.

  Raises:
    ValueError: There is no such n.
  """
  L = len(sparse)
  for n in range(L + 2):
    if sparse_flags(L, n, first) == sparse:
      return n
  raise InputError(
    f'its sparse layers {layers(sparse)!r} of {L} are not one in every n, from '
    f'layer {"1" if first else "n - 1"} on'
  )
