"""Tokenizers of our own runs are read by transformers with the same ids."""

import json

import pytest
import transformers

from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import extra_ids
from moe_jax.interop import exported_tokenizer
from tests.data.tokenizers import models

TEXTS = [*models.TEXTS, '<eos> a', 'a<eos>b <extra_id_0>']
LETTERS = tokenizers.Chars(''.join(TEXTS))
MERGED = tokenizers.TrainedOptions('bpe', 300).fit(models.WORDS)


def ended(base, **more):
  return extra_ids.extend(base, end_inputs=True, **more)


@pytest.mark.parametrize(
  'ours',
  [
    tokenizers.Bytes(),
    LETTERS,
    MERGED,
    ended(tokenizers.Bytes()),
    ended(LETTERS),
    ended(MERGED, num_sentinels=2, modes=('S',)),
  ],
  ids=lambda t: t.identity,
)
def test_ids_are_equal_there_and_back(ours, tmp_path):
  said = exported_tokenizer.write(ours, tmp_path)
  assert said == 'the tokenizer is there too'
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.eos_id)
  back = tokenizers.read(tmp_path)
  assert (back.vocab_size, back.eos_id) == (ours.vocab_size, ours.eos_id)
  for text in TEXTS:
    ids = ours.encode_inputs(text).tolist()
    assert theirs(text).input_ids == ids
    assert back.encode(text).tolist() == ours.encode(text).tolist()
    document = ours.encode(text)
    assert theirs.decode(document) == ours.decode(document) == text


def test_characters_by_hand(tmp_path):
  exported_tokenizer.write(tokenizers.Chars('b a\n'), tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs('a b\n').input_ids == [2, 1, 3, 0]
  with pytest.raises(Exception, match='Missing'):
    theirs('x')


def test_ids_that_are_not_the_next_are_left_out(tmp_path):
  # A model may have more rows than tokens; a task's ids come after the rows.
  padded = tokenizers.Json(
    MERGED.model_json(), tokenizers.SpecialTokens(eos=(0,), vocab_size=512)
  )
  said = exported_tokenizer.write(ended(padded, num_sentinels=1), tmp_path)
  assert said.endswith('without the ids that the task added')
  assert tokenizers.read(tmp_path).encode('the').tolist() == (
    MERGED.encode('the').tolist()
  )


@pytest.mark.parametrize('base', [models.unigram(), models.bpe()])
def test_sentencepiece_goes_out_as_its_file(base, tmp_path):
  ours = tokenizers.SentencePiece(base)
  assert 'tokenizer.model' in exported_tokenizer.write(ours, tmp_path)
  assert tokenizers.read(tmp_path).identity == ours.identity


def test_what_a_task_adds_to_sentencepiece_is_said(tmp_path):
  ours = tokenizers.SentencePiece(models.unigram())
  said = exported_tokenizer.write(ours, tmp_path)
  assert said.endswith('compare its ids')
  said = exported_tokenizer.write(ended(ours, num_sentinels=2), tmp_path)
  assert said.endswith(
    'without the ids that the task added; inputs here end in an EOS'
  )


def test_an_eos_that_is_left_out_has_no_name(tmp_path):
  model = tokenizers.TrainedOptions('bpe', 300).fit(models.WORDS).model_json()
  padded = tokenizers.Json(model, tokenizers.SpecialTokens(vocab_size=512))
  ours = ended(padded)
  assert ours.eos_id == 512
  exported_tokenizer.write(ours, tmp_path)
  kept = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert 'eos_token' not in kept


def test_others_are_left_out(tmp_path):
  for ours in (None, tokenizers.ClassNames(['a', 'b'])):
    assert 'the folder has none' in exported_tokenizer.write(ours, tmp_path)
  assert not any(tmp_path.iterdir())
