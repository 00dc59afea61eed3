"""Options of tokenizers that are given, and are not fitted to texts."""

import dataclasses
import hashlib
from collections.abc import Iterable

from moe_jax.config import required
from moe_jax.data.contracts import Tokenizer, TokenizerOptions


class GivenOptions(TokenizerOptions):
  """Contract of the options of a tokenizer that depends on no texts."""

  @required
  def given(self) -> Tokenizer:
    """The tokenizer of these options, which is read anew at each call.

    Raises:
      ValueError: A file is missing or bad.
    """
    raise NotImplementedError

  def identity(self) -> str:
    """The tokenizer's own identity."""
    return self.given().identity

  def fit(self, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer, whatever the texts are."""
    del texts
    return self.given()

  def known_vocab_size(self) -> int:
    """V, the size of the tokenizer's vocabulary."""
    return self.given().vocab_size


@dataclasses.dataclass(frozen=True)
class Fitted(GivenOptions):
  """A tokenizer that exists already, in place of options that would make it.

  Attributes:
    tokenizer: The tokenizer.
    replaced: The options that the tokenizer replaces, under which tokens may be
      in the cache; None if it replaces no options.
  """

  tokenizer: Tokenizer
  replaced: TokenizerOptions | None = dataclasses.field(
    default=None, compare=False
  )

  def given(self) -> Tokenizer:
    """The tokenizer that exists already."""
    return self.tokenizer


def digest(text: str) -> str:
  """16 hexadecimal digits of the text's sha256."""
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]
