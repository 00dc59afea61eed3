"""Ids that are added behind a tokenizer's, and those that it already has."""

import numpy as np
import pytest
import tokenizers as hf

from moe_jax.data.tokenizers import Bytes, Chars, Json
from moe_jax.data.tokenizers.extra_ids import extend, without_endings


def t5_like():
  """Makes a tokenizer of words whose sentinels count down, as those of T5."""
  vocabulary = {'</s>': 0, 'a': 1, 'b': 2, '<unk>': 3}
  vocabulary |= {'<extra_id_0>': 10, '<extra_id_1>': 9}
  tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token='<unk>'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(['</s>', '<extra_id_0>', '<extra_id_1>'])
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
  ids = [258, *b'a\xc3\xa9', 256, 257, 257]
  assert tokenizer.decode(ids) == '<extra_id_1>aé<extra_id_0><extra_id_0>'


def test_an_eos_is_added_where_there_is_none():
  tokenizer = extend(Chars('abc'), num_sentinels=2, end_inputs=False)
  assert (tokenizer.eos_id, tokenizer.start_id) == (3, 3)
  assert tokenizer.eos_ids == (3,)
  assert tokenizer.sentinel_ids == (4, 5)
  # An end of text has no text.
  assert tokenizer.decode([0, 3, 4]) == 'a<extra_id_0>'


def test_text_spells_them_in_inputs_alone():
  tokenizer = extend(Bytes(), num_sentinels=1, modes='S', end_inputs=True)
  text = '[S]a<extra_id_0>b'
  assert tokenizer.encode(text).tolist() == list(text.encode())
  ids = tokenizer.encode_inputs(text)
  assert ids.dtype == np.int32
  assert ids.tolist() == [258, 97, 257, 98, 256]
  plain = extend(Bytes(), end_inputs=False)
  assert plain.encode_inputs('[S]').tolist() == list(b'[S]')


def test_own_sentinels_come_first_and_inputs_end_once():
  base = t5_like()
  tokenizer = extend(base, num_sentinels=4, modes='R', end_inputs=True)
  assert tokenizer.sentinel_ids == (10, 9, 11, 12)
  assert tokenizer.names == ('<extra_id_2>', '<extra_id_3>', '[R]')
  assert base.encode_inputs('a b').tolist() == [1, 2, 0]
  for end_inputs, end in ((True, [0]), (False, [])):
    tokenizer = extend(base, modes='R', end_inputs=end_inputs)
    assert tokenizer.vocab_size == 12
    ids = tokenizer.encode_inputs('[R] a <extra_id_1> b').tolist()
    assert ids == [11, 1, 9, 2, *end]


def test_ids_of_tasks_are_not_added_twice():
  first = extend(Chars('ab'), num_sentinels=2, modes='SX', end_inputs=True)
  assert first.names == ('<eos>', '<extra_id_0>', '<extra_id_1>', '[S]', '[X]')
  plain = without_endings(first)
  assert plain.encode_inputs('a[S]').tolist() == [0, 5]
  again = extend(plain, num_sentinels=3, modes='S', end_inputs=True)
  assert again.names == (*first.names, '<extra_id_2>')
  assert again.sentinel_ids == (3, 4, 7)
  assert again.eos_id == first.eos_id == 2


def test_ids_that_mean_the_same_may_end_inputs_differently():
  plain, ended = (extend(Bytes(), end_inputs=ends) for ends in (False, True))
  assert plain.identity != ended.identity
  assert plain.ids_identity == ended.ids_identity == Bytes().ids_identity
  with_sentinel = extend(Bytes(), num_sentinels=1, end_inputs=True)
  assert with_sentinel.ids_identity != ended.ids_identity
