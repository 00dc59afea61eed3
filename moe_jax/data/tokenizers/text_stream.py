"""The text of tokens that come one by one."""

from collections.abc import Iterable

from moe_jax.data.contracts import Token, Tokenizer

# The character U+FFFD, which stands for bytes that are no character, or that
# are the beginning of a character.
_UNKNOWN = '\ufffd'
# The largest number of bytes of a UTF-8 character that lacks its last byte.
_MOST_BYTES = 3
# The number of context tokens that are decoded before the first new token.
_CONTEXT = 16


class TextStream:
  """Decodes tokens one by one; the returned texts joined are the whole text.

  The text of a token depends on the tokens before it: a word may begin with a
  space, and a character's bytes may be several tokens. So a few tokens are
  decoded again each time, and only new text is returned.

  Args:
    tokenizer: The tokenizer that decodes. Ids outside its vocabulary have no
      text.
    context: The tokens before the first added token; their text is not
      returned.
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
    tail = text[-_MOST_BYTES:]  # more bytes may still change its unknown end
    unfinished = len(tail) - len(tail.rstrip(_UNKNOWN))
    complete = max(len(text) - unfinished, self._returned)
    new, self._returned = text[self._returned : complete], complete
    if complete == len(text):
      # The next token's text cannot depend on the tokens that are dropped here.
      self._ids = self._ids[self._settled :]
      self._settled, self._returned = len(self._ids), len(self._text())
    return new

  def end(self) -> str:
    """Returns the rest of the text; U+FFFD stands for bytes of no character."""
    text = self._text()
    new, self._returned = text[self._returned :], len(text)
    return new

  def _is_id(self, token: int) -> bool:
    return 0 <= token < self._tokenizer.vocab_size

  def _text(self) -> str:
    return self._tokenizer.decode(self._ids)
