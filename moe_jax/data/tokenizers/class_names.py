"""The vocabulary of examples that have a class each.

It is what a tokenizer is elsewhere: the model's V, kept beside a run, so that
all that reads runs knows what their ids mean.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data.tokenizers.tokenizer_base import Ids, Token, Tokenizer, digest


class ClassNames(Tokenizer):
  """The vocabulary of classes: a text is one name, its id the class.

  Attributes:
    names: Of the classes, in order.
    feature_shape: Of an example; () where nobody said.
  """

  def __init__(self, names: Sequence[str], feature_shape: Sequence[int] = ()):
    self.names = tuple(names)
    self.feature_shape = tuple(feature_shape)
    self.vocab_size = len(self.names)
    self.identity = f'classes:{digest(repr(self.names))}'

  def encode(self, text: str) -> np.ndarray:
    """The class of that name, int32 [1]; nothing of an empty text.

    Raises:
      ValueError: There is none.
    """
    if text and text not in self.names:
      raise ValueError(f'class {text!r} not in {list(self.names)}')
    return np.array([self.names.index(text)] if text else [], np.int32)

  def decode(self, ids: Ids) -> str:
    """The names of the classes."""
    return ' '.join(self.names[i] for i in self._in_vocabulary(ids))

  def token_name(self, token: Token) -> str:
    """The name."""
    return self.decode([token])

  def to_json(self) -> dict[str, Any]:
    """Its kind, names and the shape of an example."""
    return {
      'kind': 'classes',
      'names': list(self.names),
      'feature_shape': list(self.feature_shape),
    }
