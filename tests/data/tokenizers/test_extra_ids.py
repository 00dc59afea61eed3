"""Ids that are added behind a tokenizer's, and those that it already has."""

import numpy as np
import pytest
import tokenizers as hf

from moe_jax.data.contracts import from_json
from moe_jax.data.tokenizers import Bytes, Chars, Json
from moe_jax.data.tokenizers.extra_ids import Extended, extend


def t5_like(names=('<extra_id_0>', '<extra_id_1>'), end_inputs=False):
  """Makes a tokenizer of words whose sentinels count down, as those of T5."""
  vocabulary = {'</s>': 0, 'a': 1, 'b': 2, '<unk>': 3}
  vocabulary |= {name: 10 - i for i, name in enumerate(names)}
  model = hf.models.WordLevel(vocabulary, unk_token='<unk>')
  tokenizer = hf.Tokenizer(model)
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(['</s>', *names])
  if end_inputs:
    tokenizer.post_processor = hf.processors.TemplateProcessing(
      single='$A </s>', special_tokens=[('</s>', 0)]
    )
  return Json(tokenizer.to_str())


def test_missing_ids_come_after_the_last():
  tokenizer = extend(Bytes(), num_sentinels=3, modes='RS', end_inputs=True)
  assert tokenizer.vocab_size == 257 + 5
  assert tokenizer.sentinel_ids == (257, 258, 259)
  assert tokenizer.token_id('[S]') == 261
  assert tokenizer.token_name(261) == '[S]'
  assert tokenizer.token_name(np.int64(101)) == "'e'"
  assert (tokenizer.eos_id, tokenizer.start_id) == (256, 256)
  with pytest.raises(ValueError, match=r"'\[X\]' is none of 5"):
    tokenizer.token_id('[X]')


def test_they_are_read_by_name():
  tokenizer = extend(Bytes(), num_sentinels=3, end_inputs=True)
  ids = [258, *b'a\xc3\xa9', 256, 257, 257]
  assert tokenizer.decode(ids) == '<extra_id_1>aé<extra_id_0><extra_id_0>'
  with pytest.raises(ValueError, match=r'token 260 not in .*vocab_size=260'):
    tokenizer.decode([260])


def test_an_eos_is_added_where_there_is_none():
  tokenizer = extend(Chars('abc'), num_sentinels=2, end_inputs=False)
  assert (tokenizer.eos_id, tokenizer.start_id) == (3, 3)
  assert tokenizer.eos_ids == (3,)
  assert tokenizer.sentinel_ids == (4, 5)
  # An end of text has no text.
  assert tokenizer.decode([0, 3, 4]) == 'a<extra_id_0>'


def test_own_sentinels_come_first():
  base = t5_like()
  tokenizer = extend(base, num_sentinels=4, modes='R', end_inputs=True)
  assert tokenizer.sentinel_ids == (10, 9, 11, 12)
  assert tokenizer.names == ('<extra_id_2>', '<extra_id_3>', '[R]')
  assert extend(base, num_sentinels=1, end_inputs=True).vocab_size == 11


def test_text_spells_them_in_inputs_alone():
  tokenizer = extend(Bytes(), num_sentinels=1, modes='S', end_inputs=True)
  text = '[S]a<extra_id_0>b'
  assert tokenizer.encode(text).tolist() == list(text.encode())
  ids = tokenizer.encode_inputs(text)
  assert ids.dtype == np.int32
  assert ids.tolist() == [258, 97, 257, 98, 256]
  plain = extend(Bytes(), end_inputs=False)
  assert plain.encode_inputs('[S]').tolist() == list(b'[S]')


def test_inputs_end_once():
  base = t5_like(end_inputs=True)
  assert base.encode_inputs('a b').tolist() == [1, 2, 0]
  for end_inputs, end in ((True, [0]), (False, [])):
    tokenizer = extend(base, modes='R', end_inputs=end_inputs)
    ids = tokenizer.encode_inputs('[R] a <extra_id_1> b').tolist()
    assert ids == [11, 1, 9, 2, *end]


@pytest.mark.parametrize('base', [Bytes(), Chars('ab'), t5_like()])
def test_it_can_be_made_again(base):
  tokenizer = extend(base, num_sentinels=3, modes='RSX', end_inputs=True)
  again = from_json(tokenizer.to_json())
  assert isinstance(again, Extended)
  assert again.identity == tokenizer.identity
  assert again.sentinel_ids == tokenizer.sentinel_ids
  other = extend(base, num_sentinels=4, modes='RSX', end_inputs=True)
  assert other.identity != tokenizer.identity


def test_the_label_says_what_is_added():
  assert extend(Bytes(), end_inputs=False).label == 'bytes'
  tokenizer = extend(Bytes(), num_sentinels=3, modes='RS', end_inputs=True)
  assert tokenizer.label == 'bytes, 5 ids added, inputs end in an EOS'


def test_ids_that_mean_the_same_may_end_inputs_differently():
  plain, ended = (extend(Bytes(), end_inputs=ends) for ends in (False, True))
  assert plain.identity != ended.identity
  assert plain.ids_identity == ended.ids_identity == Bytes().ids_identity
  with_sentinel = extend(Bytes(), num_sentinels=1, end_inputs=True)
  assert with_sentinel.ids_identity != ended.ids_identity
