"""Tokenizers that are trained on texts: merges by hand, nothing is lost."""

import pytest

from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import trained_tokenizer
from tests.data.tokenizers import models

OPTIONS = {
  kind: tokenizers.TrainedOptions(kind, 300) for kind in ('bpe', 'unigram')
}


@pytest.fixture(scope='module')
def trained():
  return {
    kind: options.fit(iter(models.WORDS * 4))
    for kind, options in OPTIONS.items()
  }


@pytest.mark.parametrize('kind', OPTIONS)
def test_every_text_comes_back(kind, trained, tmp_path):
  trained[kind].save(tmp_path / 'tokenizer.json')
  for tokenizer in (
    trained[kind],
    tokenizers.load(tmp_path / 'tokenizer.json'),
  ):
    assert tokenizer.vocab_size <= 300
    assert tokenizer.eos_id is not None
    for text in models.TEXTS:
      assert tokenizer.decode(tokenizer.encode(text)) == text.replace(
        '\u2581', ' '
      ) or (kind == 'bpe' and tokenizer.decode(tokenizer.encode(text)) == text)
      assert tokenizer.eos_id not in tokenizer.encode(f'{text}<eos>')


def test_merges_by_hand():
  # 'ab' is the most frequent pair, then 'ab' with 'c', so these are tokens.
  tokenizer = tokenizers.TrainedOptions('bpe', 260).fit(['abc,abc,abc,ab'])
  names = [tokenizer.token_name(i) for i in tokenizer.encode('abcab c')]
  assert names == ["'abc'", "'ab'", "' '", "'c'"]
  assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, 259)
  assert tokenizer.encode('abc').tolist() == [258]


def test_frequent_words_are_pieces():
  tokenizer = tokenizers.TrainedOptions('unigram', 400).fit(['the cat\n'] * 99)
  names = [tokenizer.token_name(i) for i in tokenizer.encode('the cat\n')]
  assert names[-2:] == ["' cat'", "'\\n'"]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(vocab_size=259), 'vocab_size=259'),
    (dict(model='wordpiece'), "model='wordpiece'"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    tokenizers.TrainedOptions(**options)


@pytest.mark.parametrize(
  ('count', 'most', 'kept'),
  [(7, 14, range(7)), (7, 13, (0, 2, 4, 6)), (20, 6, (0, 8, 16)), (3, 1, [0])],
)
def test_documents_are_taken_evenly_where_there_are_too_many(count, most, kept):
  texts = (f'{number:02}' for number in range(count))  # read once
  spread_texts = trained_tokenizer.spread(texts, most)
  assert spread_texts == [f'{number:02}' for number in kept]


@pytest.mark.parametrize('kind', OPTIONS)
def test_training_takes_no_more_text_than_it_needs(kind, monkeypatch):
  texts = ['the cat\n', 'a dog\n'] * 99
  monkeypatch.setattr(trained_tokenizer, 'MOST', 900)
  every_second = OPTIONS[kind].fit(texts)
  assert every_second.identity == OPTIONS[kind].fit(texts[::2]).identity


def test_no_text_is_told():
  with pytest.raises(ValueError, match='no unigram model of vocab_size=300'):
    OPTIONS['unigram'].fit([''])
