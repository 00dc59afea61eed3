"""A source, a tokenizer and a task of a user, which a config names."""

import dataclasses

import numpy as np

from moe_jax.config import option
from moe_jax.data import (
  PackedRows,
  SourceOptions,
  TaskOptions,
  Texts,
  TokenizerOptions,
)
from moe_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Counting(SourceOptions):
  """Documents that count from one, such as '1 2 3'."""

  last: int = option(3, 'Largest number that a document counts to.', minimum=1)

  def texts(self, selection=None):
    """Yields one document for each number."""
    del selection
    documents = [
      ' '.join(map(str, range(1, n + 1))) for n in range(1, self.last + 1)
    ]
    name = f'counting to {self.last}'
    return Texts(name, name, lambda split: iter(documents))


class Words(Tokenizer):
  """A tokenizer of words between blanks."""

  def __init__(self, words):
    self.words = sorted(words)
    self.vocab_size = len(self.words)
    self.identity = f'words {self.words}'

  def encode(self, text):
    """Returns the index of each word."""
    ids = [self.words.index(word) for word in text.split()]
    return np.array(ids, np.int32)

  def decode(self, ids):
    """Joins the words with blanks."""
    return ' '.join(self.words[i] for i in self._in_vocabulary(ids))

  def token_name(self, token):
    """Returns the word itself."""
    return self.decode([token])

  def state(self):
    """Returns the list of words."""
    return {'words': self.words}

  @classmethod
  def from_state(cls, state):
    """Makes the tokenizer of the words in a state."""
    return cls(state['words'])


@dataclasses.dataclass(frozen=True)
class WordsOptions(TokenizerOptions):
  """Options of a tokenizer of the words that the texts have."""

  def identity(self):
    """Returns one text for all options, which have no values."""
    return 'words'

  def fit(self, texts):
    """Makes the tokenizer of all words of the texts."""
    return Words({word for text in texts for word in text.split()})


@dataclasses.dataclass(frozen=True)
class Backwards(TaskOptions):
  """Language modelling from the end of a text to its beginning."""

  label = 'backwards'
  makes_examples = False

  twice: bool = option(False, 'Whether every text is there twice.')

  def rows(self, stream, tokenizer, shape):
    """Returns rows of the reversed stream of tokens."""
    del tokenizer
    tokens, _ = stream
    tokens = np.tile(tokens[::-1], 1 + self.twice)
    return PackedRows(tokens, np.array([0]), shape.seq_len)
