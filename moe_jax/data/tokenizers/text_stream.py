"""Text from tokens, one at a time, without parts of characters."""

from collections.abc import Iterable

from moe_jax.data.tokenizers.contract import Token, Tokenizer

# The character that stands for bytes that are no character, or not yet one.
_UNKNOWN = '\ufffd'
# The most bytes of a UTF-8 character that lacks its last byte.
_MOST_BYTES = 3
# The number of known tokens that are decoded before the first new one.
_CONTEXT = 16


class TextStream:
  """Decodes tokens one by one; its results joined are the whole text.

  The text of a token depends on those before it: a word may begin with a space,
  and a character's bytes may be several tokens. So a few tokens are decoded
  again each time, and only new text is returned.

  Args:
    tokenizer: The tokenizer that decodes. Ids that it does not know have no
      text.
    context: The tokens before the first, whose text is not returned.
  """

  def __init__(self, tokenizer: Tokenizer, context: Iterable[Token] = ()):
    self._tokenizer = tokenizer
    self._ids = [i for i in map(int, context) if self._is_id(i)][-_CONTEXT:]
    self._settled = len(self._ids)  # ids whose text is complete and returned
    self._returned = len(self._text())  # characters that have been returned

  def add(self, token: Token) -> str:
    """Returns the text that this token completes, which may be ''."""
    if not self._is_id(int(token)):
      return ''
    self._ids.append(int(token))
    text = self._text()
    complete = max(len(text) - _unfinished(text), self._returned)
    new, self._returned = text[self._returned : complete], complete
    if complete == len(text):
      self._forget()
    return new

  def end(self) -> str:
    """Returns the rest, with bytes that never became a character."""
    text = self._text()
    new, self._returned = text[self._returned :], len(text)
    return new

  def _is_id(self, token: int) -> bool:
    return 0 <= token < self._tokenizer.vocab_size

  def _text(self) -> str:
    return self._tokenizer.decode(self._ids)

  def _forget(self) -> None:
    """Drops the tokens on which the next token's text cannot depend."""
    self._ids = self._ids[self._settled :]
    self._settled = len(self._ids)
    self._returned = len(self._text())


def _unfinished(text: str) -> int:
  """The number of characters at the end that more bytes may still change."""
  tail = text[-_MOST_BYTES:]
  return len(tail) - len(tail.rstrip(_UNKNOWN))
