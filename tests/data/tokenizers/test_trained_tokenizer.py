"""Tokenizers that are trained on texts: merges and pieces by hand."""

import pytest

from moe_jax.data.tokenizers import TrainedOptions, trained_tokenizer


def test_merges_by_hand():
  # 'ab' is the most frequent pair, then 'ab' with 'c', so these are tokens.
  tokenizer = TrainedOptions('bpe', 260).fit(['abc,abc,abc,ab'])
  names = [tokenizer.token_name(i) for i in tokenizer.encode('abcab c')]
  assert names == ["'abc'", "'ab'", "' '", "'c'"]
  assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, 259)
  assert tokenizer.encode('abc').tolist() == [258]


def test_frequent_words_are_pieces():
  tokenizer = TrainedOptions('unigram', 400).fit(['the cat\n'] * 99)
  names = [tokenizer.token_name(i) for i in tokenizer.encode('the cat\n')]
  assert names[-2:] == ["' cat'", "'\\n'"]
  assert tokenizer.eos_id == 1 and tokenizer.vocab_size <= 400


@pytest.mark.parametrize(
  ('count', 'most', 'kept'),
  [(7, 14, range(7)), (7, 13, (0, 2, 4, 6)), (20, 6, (0, 8, 16)), (3, 1, [0])],
)
def test_documents_are_taken_evenly_where_there_are_too_many(count, most, kept):
  texts = (f'{number:02}' for number in range(count))  # read once
  spread_texts = trained_tokenizer.spread(texts, most)
  assert spread_texts == [f'{number:02}' for number in kept]


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_training_takes_no_more_text_than_it_needs(kind, monkeypatch):
  texts, options = ['the cat\n', 'a dog\n'] * 99, TrainedOptions(kind, 300)
  monkeypatch.setattr(trained_tokenizer, 'MOST', 900)
  assert options.fit(texts).identity == options.fit(texts[::2]).identity


def test_no_text_is_told():
  with pytest.raises(ValueError, match='no unigram model of vocab_size=300'):
    TrainedOptions('unigram', 300).fit([''])
