"""SentencePiece models: ids by hand, and those of two other readers."""

import concurrent.futures
import multiprocessing
import pickle
import random

import numpy as np
import pytest
import sentencepiece
import transformers

from moe_jax.data import tokenizers
from tests.data.tokenizers import models

KINDS = {'unigram': models.unigram, 'bpe': models.bpe}


@pytest.fixture(params=KINDS)
def model(request):
  return KINDS[request.param]()


def test_ids_and_texts_are_those_of_the_library(model, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(model)
  path = str(tmp_path / 'tokenizer.model')
  options = tokenizers.FileOptions(path)
  theirs = sentencepiece.SentencePieceProcessor(model_file=path)
  options.fit([]).save(tmp_path / 'saved.json')
  for ours in (options.fit([]), tokenizers.load(tmp_path / 'saved.json')):
    for text in models.TEXTS:
      ids = ours.encode(text)
      assert ids.dtype == np.int32
      assert ids.tolist() == theirs.encode(text)
      assert ours.decode(ids) == theirs.decode(theirs.encode(text))
    assert ours.vocab_size == theirs.get_piece_size()
    assert options.known_vocab_size() == ours.vocab_size
    assert options.identity() == ours.identity
    with pytest.raises(ValueError, match='token -1 not in'):
      ours.decode([-1])


def test_ids_are_those_of_transformers(model, tmp_path):
  # The library `transformers` converts the model into one of `tokenizers`.
  (tmp_path / 'tokenizer.model').write_bytes(model)
  (tmp_path / 'config.json').write_text('{"model_type": "mixtral"}')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = tokenizers.read(tmp_path)
  for text in models.TEXTS:
    if '</s>' not in text and '\x00' not in text:
      ids = theirs(text, add_special_tokens=False).input_ids
      assert ours.encode(text).tolist() == ids


def test_bytes_and_symbols_by_hand():
  tokenizer = tokenizers.SentencePiece(models.bpe())
  names = [tokenizer.token_name(i) for i in tokenizer.encode('a<sep>é\tthe')]
  # A space comes before a text; é is unknown, and two bytes.
  assert names == [
    "' '", "'a'", "'<sep>'", '<0xC3>', '<0xA9>', '<0x09>', "'t'", "'he'"
  ]  # fmt: skip
  assert tokenizer.token_name(tokenizer.eos_id) == '<eos>'
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
  # Whatever is written comes back, and no document forges its end.
  for text in models.TEXTS[:-2]:
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.eos_id not in tokenizer.encode('a</s>b')
  assert (
    tokenizer.decode([*tokenizer.encode('a</s>b'), tokenizer.eos_id])
    == 'a</s>b'
  )


def test_normalisation_and_unknown_characters_by_hand():
  tokenizer = tokenizers.SentencePiece(models.unigram())
  assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, None)
  # Spaces, tabs and newlines become one space, and 'ﬁ' two letters.
  assert tokenizer.decode(tokenizer.encode(' the\t\n cat ')) == 'the cat'
  assert tokenizer.encode('\ufb01').tolist() == tokenizer.encode('fi').tolist()
  assert 2 in tokenizer.encode('the 👍')
  assert tokenizer.token_name(2) == '<unk>'


def ids_of(tokenizer):
  return [tokenizer.encode(text).tolist() for text in models.TEXTS[:-1]]


def identity_of(kind):
  """Returns the identity of a tokenizer that this process trains."""
  return tokenizers.TrainedOptions(kind, 300).fit(models.WORDS * 4).identity


@pytest.mark.slow
def test_another_process_has_an_equal_tokenizer(monkeypatch):
  # The other process has another order of sets, and more threads.
  monkeypatch.setenv('PYTHONHASHSEED', '1')
  monkeypatch.setenv('RAYON_NUM_THREADS', '4')
  all_kinds = [
    tokenizers.Bytes(),
    tokenizers.Chars(''.join(models.TEXTS)),
    tokenizers.SentencePiece(models.bpe()),
    tokenizers.TrainedOptions('bpe', 300).fit(models.WORDS),
  ]
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    assert [*pool.map(ids_of, all_kinds)] == [*map(ids_of, all_kinds)]
    kinds = 'bpe', 'unigram'
    assert [*pool.map(identity_of, kinds)] == [*map(identity_of, kinds)]


def test_pickles_are_states(model):
  base = tokenizers.SentencePiece(model)
  for tokenizer in (
    base,
    tokenizers.Extended(base, ['[S]'], end_inputs=True),
    tokenizers.TrainedOptions('bpe', 270).fit(models.WORDS),
  ):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.to_json() == tokenizer.to_json()
    assert again.identity == tokenizer.identity


def damaged_models(model, seed):
  """Yields damaged models: cut, or with other bytes at some positions."""
  draw = random.Random(seed)
  for size in (0, 1, len(model) // 2, len(model) - 1):
    yield model[:size]
  for count in (1, 3, 40):
    changed = bytearray(model)
    for _ in range(count):
      changed[draw.randrange(len(model))] = draw.randrange(256)
    yield bytes(changed)


def test_damaged_models_are_read_or_refused(model, tmp_path):
  path = tmp_path / 'spiece.model'
  num_refused = 0
  for seed in range(4):
    for content in damaged_models(model, seed):
      path.write_bytes(content)
      try:
        tokenizer = tokenizers.read(path)
      except ValueError as error:
        assert 'spiece.model is no SentencePiece model' in str(error)
        num_refused += 1
      else:
        tokenizer.decode(tokenizer.encode('the cat 👍'))
  assert num_refused >= 12
