"""Streamed text has whole characters, and in the end all of them."""

import hypothesis
import tokenizers as hf
from hypothesis import strategies as st

from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import TextStream

# The characters have one, two, three and four bytes.
TEXT = 'a é € 😀 b'


def texts_of(tokenizer, ids, context=()):
  """Returns the text streamed with each token, then the text at the end."""
  stream = TextStream(tokenizer, context)
  return [*map(stream.add, ids), stream.end()]


def test_bytes_are_said_character_by_character():
  texts = texts_of(tokenizers.Bytes(), 'é€'.encode())
  assert texts == ['', 'é', '', '', '€', '']


def test_bytes_that_are_no_character():
  # The first byte of a second é never gets its second one: it is streamed once
  # the next byte shows this, or at the end.
  byte = 'é'.encode()[0]
  tokenizer = tokenizers.Bytes()
  assert ''.join(texts_of(tokenizer, [byte, ord('a'), byte])) == '\ufffda\ufffd'
  assert texts_of(tokenizer, [byte])[-1] == '\ufffd'
  texts = texts_of(tokenizer, [0x80] * 9)
  assert ''.join(texts) == '\ufffd' * 9
  assert texts[-1] == '\ufffd' * 3


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.binary(max_size=40))
def test_any_bytes_are_in_the_end_what_the_tokenizer_says(raw):
  tokenizer = tokenizers.Bytes()
  assert ''.join(texts_of(tokenizer, raw)) == tokenizer.decode(list(raw))


def metaspace():
  """Makes a tokenizer like SentencePiece's, with marked words and bytes."""
  vocab = {'▁a': 0, '▁b': 1, 'b': 2, '▁': 3}
  vocab |= {f'<0x{byte:02X}>': 4 + byte for byte in range(256)}
  model = hf.Tokenizer(hf.models.BPE(vocab, [], byte_fallback=True))
  replace, strip = hf.decoders.Replace('▁', ' '), hf.decoders.Strip(' ', 1, 0)
  joined = hf.decoders.ByteFallback(), hf.decoders.Fuse()
  model.decoder = hf.decoders.Sequence([replace, *joined, strip])
  return tokenizers.Json(model.to_str())


def test_a_vocabulary_with_fallback_to_bytes():
  tokenizer = metaspace()
  byte_ids = [4 + byte for byte in '€é'.encode()]
  texts = texts_of(tokenizer, [0, *byte_ids, 1, 2])
  assert texts == ['a', '', '', '€', '', 'é', ' b', 'b', '']


def test_the_context_decides_on_the_first_space():
  # A decoded word loses the space before it, unless it follows a prompt.
  tokenizer = metaspace()
  assert texts_of(tokenizer, [1, 1]) == ['b', ' b', '']
  for n in (1, 30):
    assert texts_of(tokenizer, [1, 1], context=[0] * n) == [' b', ' b', '']


def test_ids_that_the_tokenizer_lacks_say_nothing():
  tokenizer = tokenizers.Bytes()
  ids = [104, tokenizer.vocab_size, tokenizer.eos_id, 105]
  assert texts_of(tokenizer, ids, context=[tokenizer.vocab_size + 3]) == [
    'h', '', '', 'i', '',
  ]  # fmt: skip


def test_only_a_few_tokens_are_decoded_again():
  # A long text takes linear time.
  tokenizer = tokenizers.Bytes()
  longest = 0
  decode = tokenizer.decode

  class Counting(tokenizers.Bytes):
    def decode(self, ids):
      nonlocal longest
      longest = max(longest, len(ids))
      return decode(ids)

  assert ''.join(texts_of(Counting(), (TEXT * 30).encode())) == TEXT * 30
  assert longest < 20
