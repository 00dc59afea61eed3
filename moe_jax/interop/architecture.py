"""What this package knows of one architecture of transformers.

Not here: the architectures themselves, a file each.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.interop.config_keys import Keys, Values
from moe_jax.interop.mapping import Names
from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.moe import MoeOptions
from moe_jax.models import ModelOptions
from moe_jax.models.text_options import StackOptions

# Our names of the activations of feed-forwards that have no gate.
ACTIVATIONS = {
  'relu': 'relu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


def _numbered(options: ModelOptions) -> None:
  """Every token has a number, whatever its id."""
  del options


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One `model_type`.

  Attributes:
    model_type: The name in config.json.
    classes: The names that `architectures` may have; the first is written.
    keys: The keys of config.json.
    problems: Returns what our models cannot express of the values of the keys,
      each text a problem.
    options: Returns the options of the model that values without problems
      describe.
    describe: Returns the keys of config.json that the options of a model
      decide; raises ValueError where the architecture has no such model.
    suits: Whether a model that came from nowhere is exported as this one.
    names: The tensors of our parameters; see `mapping`.
    prefix: What the names of tensors lack in a model without its head.
    computed: Patterns of the names of tensors that hold what is computed
      anyway.
    fills_gaps: Whether the checkpoints were trained to fill the gaps in text
      that tokens of their own stand for (T5).
    unnumbered: Returns the id of the tokens that have no position of their own;
      None where there is none.
  """

  model_type: str
  classes: tuple[str, ...]
  keys: Keys
  problems: Callable[[Values], list[str]]
  options: Callable[[Values], ModelOptions]
  describe: Callable[[Any], dict[str, Any]]
  suits: Callable[[ModelOptions], bool]
  names: Names
  prefix: str = ''
  computed: tuple[str, ...] = ()
  fills_gaps: bool = False
  unnumbered: Callable[[ModelOptions], int | None] = _numbered


def unsupported(key: str, name: str, table: Mapping[str, str]) -> list[str]:
  """The problem of an activation that our models do not have, or none."""
  if name in table:
    return []
  return [f'{key}={name!r} is not supported, only {sorted(table)}']


def written(name: str, table: Mapping[str, str]) -> str:
  """Their first name of our activation; ours where they have none."""
  return next((theirs for theirs, ours in table.items() if ours == name), name)


def filled(
  half: StackOptions, width: int
) -> tuple[AttentionOptions, MoeOptions]:
  """Attention and experts of a half, with the sizes that were left at 0."""
  return half.attention.within(width), half.moe.within(half.ffn, half.dropout)


def layers(sparse: list[int], num_layers: int) -> str:
  """Our string for sparse layers by number."""
  if len(sparse) in (0, num_layers):
    return 'all' if sparse else 'none'
  return ','.join(map(str, sparse))


def period(sparse: tuple[bool, ...], first: int) -> int | None:
  """The step of a pattern that is sparse at `first(step)`, + step, ...

  Args:
    sparse: A flag for each layer.
    first: With 0 the first sparse layer is step - 1; with 1 it is layer 1.

  Returns:
    The step; None where no step gives the pattern.
  """
  for step in range(len(sparse) + 2):
    if tuple(is_sparse(i, step, first) for i in range(len(sparse))) == sparse:
      return step
  return None


def is_sparse(layer: int, step: int, first: int) -> bool:
  """Whether a layer is sparse under a step; none is under step 0.

  Args:
    layer: The number of the layer, from 0.
    step: The number of layers of which one is sparse.
    first: 0 as NLLB counts, 1 as Switch does.
  """
  if step <= 1:
    return step == 1
  return layer % step == (1 if first else step - 1)
