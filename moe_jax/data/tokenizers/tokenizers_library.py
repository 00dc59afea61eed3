"""Calls of the `tokenizers` library, with its errors as ours.

The library raises bare Exceptions, and panics of Rust, which are none.
"""

import tokenizers

from moe_jax.data.plain_files import first_line
from moe_jax.errors import InputError

_LARGEST_ID = 2**31 - 1


def read_model(text: str) -> tokenizers.Tokenizer:
  """The model of a `tokenizer.json`, which neither truncates nor pads.

  Raises:
    ValueError: The text is no such file.
  """
  try:
    model = tokenizers.Tokenizer.from_str(text)
    model.no_truncation()
    model.no_padding()
  except BaseException as error:
    raise _value_error('not a tokenizers JSON file', error) from None
  return model


def vocabulary_of(model: tokenizers.Tokenizer) -> dict[str, int]:
  """The ids of a model's tokens, by token.

  Raises:
    ValueError: There is no token, or an id is no int32.
  """
  vocabulary = model.get_vocab(with_added_tokens=True)
  if not vocabulary:
    raise InputError('the tokenizer has no tokens')
  if max(vocabulary.values()) > _LARGEST_ID:
    largest = max(vocabulary, key=lambda name: vocabulary[name])
    raise InputError(
      f'token {largest!r:.80} has the id {vocabulary[largest]}, above the '
      f'largest int32, {_LARGEST_ID}'
    )
  return vocabulary


def encoded(
  model: tokenizers.Tokenizer, text: str, **options: bool
) -> tokenizers.Encoding:
  """The encoding of a text.

  Raises:
    ValueError: The model cannot encode it.
  """
  try:
    return model.encode(text, **options)
  except BaseException as error:
    problem = f'the tokenizer cannot encode {text!r:.80}'
    raise _value_error(problem, error) from None


def _value_error(problem: str, error: BaseException) -> BaseException:
  """A ValueError for the library's bare Exceptions and panics of Rust."""
  if isinstance(error, Exception) or type(error).__name__ == 'PanicException':
    return InputError(f'{problem}: {first_line(error)}')
  return error  # Ctrl-C
