"""Bytes and characters, by hand."""

import pytest

from moe_jax.data import tokenizers


def test_bytes_by_hand():
  tokenizer = tokenizers.Bytes()
  assert tokenizer.vocab_size == 257
  assert tokenizer.encode('aé').tolist() == [97, 0xC3, 0xA9]
  # The first byte of é alone is invalid UTF-8; an end of text has no text.
  assert tokenizer.decode([97, 0xC3, 256]) == 'a\ufffd'
  names = [tokenizer.token_name(t) for t in (32, 10, 101, 0x80, 256)]
  assert names == ["' '", "'\\n'", "'e'", '0x80', '<eos>']


def test_chars_by_hand():
  tokenizer = tokenizers.CharsOptions().fit(iter(['ba', 'é\n', 'ab']))
  assert (tokenizer.vocab_size, tokenizer.eos_id) == (4, None)
  assert tokenizer.encode('abé\n').tolist() == [1, 2, 3, 0]
  assert tokenizer.token_name(0) == "'\\n'"
  assert tokenizer.identity != tokenizers.Chars('abc\n').identity
  for unseen in '!€':  # between those that are known, and after them
    with pytest.raises(ValueError, match=f"character '{unseen}' not in"):
      tokenizer.encode(f'ab{unseen}')
  with pytest.raises(ValueError, match='at least one character'):
    tokenizers.CharsOptions().fit([''])
