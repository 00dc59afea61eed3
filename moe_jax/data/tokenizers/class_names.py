"""The vocabulary of examples that have a class each.

It takes the place of a tokenizer: it gives the model's V, and is kept in the
run's folder, so that the meaning of the ids is known when a run is read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.data.tokenizers.contract import Ids, Token, Tokenizer, digest
from moe_jax.errors import InputError


class ClassNames(Tokenizer, kind='classes'):
  """The vocabulary of classes; a text is one name, and its id is the class.

  Attributes:
    names: Names of the classes, in order.
    feature_shape: Shape of an example; () if it is not known.
  """

  def __init__(self, names: Sequence[str], feature_shape: Sequence[int] = ()):
    self.names = tuple(names)
    if len(set(self.names)) < len(self.names) or not self.names:
      raise InputError(f'classes {list(self.names)!r:.200} must be different')
    self.feature_shape = tuple(feature_shape)
    self.vocab_size = len(self.names)
    self.identity = f'classes:{digest(repr(self.names))}'

  def encode(self, text: str) -> np.ndarray:
    """The class of that name, int32 [1]; an empty text has no ids.

    Raises:
      ValueError: There is no such class.
    """
    if text and text not in self.names:
      raise InputError(f'class {text!r} not in {list(self.names)}')
    return np.array([self.names.index(text)] if text else [], np.int32)

  def decode(self, ids: Ids) -> str:
    """The names of the classes."""
    return ' '.join(self.names[i] for i in self._in_vocabulary(ids))

  def token_name(self, token: Token) -> str:
    """The name of the class."""
    return self.decode([token])

  def state(self) -> dict[str, Any]:
    """The names and the shape of an example."""
    return {
      'names': list(self.names),
      'feature_shape': list(self.feature_shape),
    }

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'ClassNames':
    """See `Tokenizer.from_state`."""
    return cls(state['names'], state.get('feature_shape', ()))
