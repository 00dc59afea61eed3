"""SentencePiece models: ids by hand, and those of two other readers."""

import random

import pytest
import sentencepiece
import transformers

from moe_jax.data import tokenizers
from tests.data.tokenizers import models


@pytest.fixture(params=['unigram', 'bpe'])
def model(request):
  return getattr(models, request.param)()


def test_ids_and_texts_are_those_of_two_libraries(model, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(model)
  (tmp_path / 'config.json').write_text('{"model_type": "mixtral"}')
  ours = tokenizers.FileOptions(str(tmp_path / 'tokenizer.model')).fit([])
  theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
  # The library `transformers` converts the model into one of `tokenizers`.
  converted = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in models.TEXTS:
    ids = ours.encode(text).tolist()
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)
    if '</s>' not in text and '\x00' not in text:
      assert converted(text, add_special_tokens=False).input_ids == ids
  assert ours.vocab_size == theirs.get_piece_size()


def test_bytes_and_symbols_by_hand():
  tokenizer = tokenizers.SentencePiece(models.bpe())
  names = [tokenizer.token_name(i) for i in tokenizer.encode('a<sep>é\tthe')]
  # A space comes before a text; é is unknown, and two bytes.
  assert names == [
    "' '", "'a'", "'<sep>'", '<0xC3>', '<0xA9>', '<0x09>', "'t'", "'he'"
  ]  # fmt: skip
  assert tokenizer.token_name(tokenizer.eos_id) == '<eos>'
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)


def test_normalisation_and_unknown_characters_by_hand():
  tokenizer = tokenizers.SentencePiece(models.unigram())
  assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, None)
  # Spaces, tabs and newlines become one space, and 'ﬁ' two letters.
  assert tokenizer.decode(tokenizer.encode(' the\t\n cat ')) == 'the cat'
  assert tokenizer.encode('\ufb01').tolist() == tokenizer.encode('fi').tolist()
  assert 2 in tokenizer.encode('the 👍')
  assert tokenizer.token_name(2) == '<unk>'


def test_damaged_models_are_read_or_refused(model, tmp_path):
  path, draw = tmp_path / 'spiece.model', random.Random(0)
  damaged = [model[:size] for size in (0, 1, len(model) // 2, len(model) - 1)]
  for count in (1, 3, 40) * 4:
    changed = bytearray(model)
    for _ in range(count):
      changed[draw.randrange(len(model))] = draw.randrange(256)
    damaged.append(bytes(changed))
  num_refused = 0
  for content in damaged:
    path.write_bytes(content)
    try:
      tokenizer = tokenizers.read(path)
    except ValueError as error:
      assert 'spiece.model is no SentencePiece model' in str(error)
      num_refused += 1
    else:
      tokenizer.decode(tokenizer.encode('the cat 👍'))
  assert num_refused >= 4
