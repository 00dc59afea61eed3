"""Scores of texts equal values computed by hand."""

import math

import pytest

from moe_jax.evaluation.scores import exact_match, make_scores, rouge_l


def score(name, outputs, targets, **options):
  return make_scores(name, **options)[name].compute(outputs, targets)


def test_rouge_l_is_about_words_in_order():
  # In Lin's example three of four words are in order, and two where the order
  # is reversed.
  target = ['police killed the gunman']
  assert rouge_l(['police kill the gunman'], target) == pytest.approx(75)
  assert rouge_l(['the gunman kill police'], target) == pytest.approx(50)
  # A word in between does not break a subsequence: 'the cat on the mat' is
  # common to texts of six and five words.
  percent = rouge_l(['the cat sat on the mat'], ['the cat on the mat'])
  assert percent == pytest.approx(100 * 2 * 5 / 11)
  # A repeated word counts twice only where both texts repeat it.
  assert rouge_l(['a a a'], ['a b']) == pytest.approx(100 * 2 / 5)


def test_rouge_l_is_a_mean_over_pairs_without_case_and_marks():
  outputs = ['Return the_value.', '', 'x', '...']
  targets = ['return: THE value', 'nothing', 'x y z', '...']
  # Two of these texts have no word.
  assert rouge_l(outputs, targets) == pytest.approx(100 * (1 + 0 + 0.5 + 0) / 4)


def test_exact_match_is_but_for_spaces_around():
  outputs, targets = ['a b\n', 'a  b', 'A b'], ['a b', 'a b', 'a b']
  assert exact_match(outputs, targets) == pytest.approx(100 / 3)


def test_bleu_is_the_corpus_bleu_with_its_brevity_penalty():
  # All n-grams are right, and the output has 4 words instead of 5.
  bleu = score('bleu', ['a b c d'], ['a b c d e'])
  assert bleu == pytest.approx(100 * math.exp(1 - 5 / 4))
  # In the whole corpus 7 of 8 words, 5 of 6 pairs, 3 of 4 triples and 1 of 2
  # four-grams are right.
  bleu = score('bleu', ['a b c d', 'e f g x'], ['a b c d', 'e f g h'])
  expected = (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** (1 / 4)
  assert bleu == pytest.approx(100 * expected)


def test_bleu_splits_words_as_it_is_told():
  output, target = ['abcd'], ['abce']
  assert score('bleu', output, target, bleu_tokenizer='13a') == 0
  chars = score('bleu', output, target, bleu_tokenizer='char')
  # Right are 3 of 4 characters, 2 of 3 pairs and 1 of 2 triples; of the single
  # four-gram none, which is smoothed to a half.
  assert chars == pytest.approx(100 * (3 / 4 * 2 / 3 / 2 / 2) ** (1 / 4))


def test_chrf_is_about_characters():
  # Right are 2 of 3 characters, 1 of 2 pairs and none of the single triple, in
  # precision and in recall.
  chrf = score('chrf', ['abc'], ['abd'])
  assert chrf == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_scores_come_in_order_with_how_they_were_computed():
  scores = make_scores('exact_match,bleu', 'intl')
  assert list(scores) == ['exact_match', 'bleu']
  scores['bleu'].compute(['a'], ['a'])
  assert 'tok:intl' in scores['bleu'].signature()
