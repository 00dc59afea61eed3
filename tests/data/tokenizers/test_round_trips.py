"""Round trips, token names and refusals of each tokenizer."""

import pathlib

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data import tokenizers

TEXT = 'Größe: 10 €, 日本\n\t👍'


def bpe(eos='<|endoftext|>'):
  """Trains a small byte-level BPE model whose end of text `eos` has id 0."""
  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=290,
    special_tokens=[eos],
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(['the cat and the hat, the end'] * 3, trainer)
  return model


def all_kinds():
  return [
    tokenizers.Bytes(),
    tokenizers.Chars(TEXT),
    tokenizers.Json(bpe().to_str()),
  ]


@pytest.mark.parametrize('tokenizer', all_kinds(), ids=lambda t: t.identity)
def test_round_trip_through_a_file(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 't.json')
  for t in (tokenizer, tokenizers.load(tmp_path / 't.json')):
    ids = t.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < t.vocab_size
    assert t.decode(ids) == TEXT
    assert t.encode('').shape == (0,)
    assert t.identity == tokenizer.identity
    assert (t.eos_id, t.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    for outside in (-1, t.vocab_size):
      with pytest.raises(ValueError, match=f'token {outside} not in'):
        t.decode([outside])
      with pytest.raises(ValueError, match=f'token {outside} not in'):
        t.token_name(outside)


def normalizing():
  """Returns a model of words that changes their text and adds a space."""
  model = hf.Tokenizer(hf.models.Unigram([('?', 0.0), ('\u2581a', -1.0)], 0))
  model.normalizer = hf.normalizers.NFKC()
  model.pre_tokenizer = hf.pre_tokenizers.Metaspace()
  model.add_special_tokens(['</s>'])
  return model


@pytest.mark.parametrize(
  'tokenizer',
  [
    *all_kinds(),
    tokenizers.Json(normalizing().to_str()),
    tokenizers.Extended(tokenizers.Bytes(), ['<added>'], end_inputs=True),
  ],
  ids=lambda t: t.identity,
)
def test_many_texts_are_encoded_like_each(tokenizer):
  texts = [TEXT, '', TEXT[::-1], 'a </s><|endoftext|>', '\uff41 a\u0301']
  if isinstance(tokenizer, tokenizers.Chars):
    texts = texts[:3]
  batch = tokenizer.encode_batch(texts)
  assert [ids.tolist() for ids in batch] == [
    tokenizer.encode(text).tolist() for text in texts
  ]


@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_bytes_know_every_text(text):
  tokenizer = tokenizers.Bytes()
  assert tokenizer.encode(text).tolist() == list(text.encode())
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_kill_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'tokenizer.json'
  tokenizers.Bytes().save(path)

  def killed(file, text, **_):
    file.write_bytes(text[:9].encode())
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, 'write_text', killed)
  with pytest.raises(KeyboardInterrupt):
    tokenizers.Chars('ab').save(path)
  assert tokenizers.load(path).identity == 'bytes'


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


@pytest.mark.parametrize('unseen', ['!', 'c', '€'])
def test_chars_name_the_unseen(unseen):
  with pytest.raises(ValueError, match=f"character '{unseen}' not in"):
    tokenizers.Chars('abdé').encode(f'ab{unseen}')


def test_chars_need_a_character():
  with pytest.raises(ValueError, match='at least one character'):
    tokenizers.CharsOptions().fit([''])


def test_json_by_hand(tmp_path):
  path = tmp_path / 'bpe.json'
  bpe('</s>').save(str(path))
  tokenizer = tokenizers.JsonOptions(str(path)).fit([])
  assert tokenizer.eos_id == 0
  assert tokenizer.token_name(0) == '<eos>'
  assert tokenizer.decode([0]) == ''
  (the_id,) = tokenizer.encode('the')  # the most frequent word is one token
  assert tokenizer.token_name(the_id) == "'the'"
  half_id = tokenizer.encode('é')[0]
  assert '\ufffd' not in tokenizer.token_name(half_id)
  # A document's text cannot contain the token of its end.
  forged_ids = tokenizer.encode('a</s>b')
  assert 0 not in forged_ids
  assert tokenizer.decode(forged_ids) == 'a</s>b'


def test_a_text_that_cannot_be_encoded_is_named_among_others():
  model = hf.Tokenizer(hf.models.WordLevel({'a': 0, 'b': 1}))
  model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  tokenizer = tokenizers.Json(model.to_str())
  with pytest.raises(ValueError, match="'a strange text'"):
    tokenizer.encode_batch(['a b ' * 40, 'a strange text', 'b'])


def test_a_class_that_encodes_otherwise_encodes_batches_so():
  class Upper(tokenizers.Bytes, kind='upper of a test'):
    def encode(self, text):
      return super().encode(text.upper())

  assert Upper().encode_batch(['ab'])[0].tolist() == list(b'AB')


def test_json_ignores_truncation_padding_and_unusual_eos():
  model = bpe('<stop>')
  model.enable_truncation(2)
  model.enable_padding(length=9)
  tokenizer = tokenizers.Json(model.to_str())
  assert tokenizer.decode(tokenizer.encode('a longer text')) == 'a longer text'
  assert tokenizer.eos_id is None


def test_identities_tell_tokenizers_apart(tmp_path):
  paths = [tmp_path / 'a.json', tmp_path / 'b.json']
  for path, eos in zip(paths, ['</s>', '<eos>']):
    bpe(eos).save(str(path))
  file_options = [tokenizers.JsonOptions(str(path)) for path in paths]
  kinds = [tokenizers.BytesOptions(), tokenizers.CharsOptions(), *file_options]
  assert len({options.identity() for options in kinds}) == 4
  assert [options.known_vocab_size() for options in kinds] == [
    257, None, 270, 270
  ]  # fmt: skip
  assert tokenizers.Chars('ab').identity != tokenizers.Chars('ac').identity


def test_a_missing_file_is_named():
  options = tokenizers.JsonOptions('missing.json')
  for function in (options.identity, lambda: options.fit([])):
    with pytest.raises(ValueError, match=r'no file missing\.json'):
      function()
