"""Scores against values worked out by hand."""

import math

import pytest

from moe_jax.evaluation.scores import exact_match, make_scores, rouge_l


def score(name, outputs, targets, **options):
  return make_scores(name, **options)[name].compute(outputs, targets)


def test_rouge_l_is_about_words_in_order():
  # Lin's own example: three of four words, in order; two where turned around.
  target = ['police killed the gunman']
  assert rouge_l(['police kill the gunman'], target) == pytest.approx(75)
  assert rouge_l(['the gunman kill police'], target) == pytest.approx(50)
  # A word between is no break: 'the cat on the mat' of six words and five.
  found = rouge_l(['the cat sat on the mat'], ['the cat on the mat'])
  assert found == pytest.approx(100 * 2 * 5 / 11)
  # A word said twice counts twice only where both say it twice.
  assert rouge_l(['a a a'], ['a b']) == pytest.approx(100 * 2 / 5)


def test_rouge_l_is_a_mean_over_pairs_without_case_and_marks():
  outputs = ['Return the_value.', '', 'x', '...']
  targets = ['return: THE value', 'nothing', 'x y z', '...']
  # 3 of 3 words, none, 1 of 1 and 3; and two texts without a word.
  assert rouge_l(outputs, targets) == pytest.approx(100 * (1 + 0 + 0.5 + 0) / 4)


def test_exact_match_is_but_for_spaces_around():
  outputs, targets = ['a b\n', 'a  b', 'A b'], ['a b', 'a b', 'a b']
  assert exact_match(outputs, targets) == pytest.approx(100 / 3)


def test_bleu_is_the_corpus_bleu_with_its_brevity_penalty():
  # Every n-gram is right, at 4 words of 5.
  found = score('bleu', ['a b c d'], ['a b c d e'])
  assert found == pytest.approx(100 * math.exp(1 - 5 / 4))
  # Of the corpus: 7 of 8 words, 5 of 6 pairs, 3 of 4 triples, 1 of 2 fours.
  found = score('bleu', ['a b c d', 'e f g x'], ['a b c d', 'e f g h'])
  expected = (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** (1 / 4)
  assert found == pytest.approx(100 * expected)


def test_bleu_splits_words_as_it_is_told():
  output, target = ['abcd'], ['abce']
  assert score('bleu', output, target, bleu_tokenizer='13a') == 0
  chars = score('bleu', output, target, bleu_tokenizer='char')
  # 3 of 4, 2 of 3, 1 of 2, and of the one four-gram none, smoothed to a half.
  assert chars == pytest.approx(100 * (3 / 4 * 2 / 3 / 2 / 2) ** (1 / 4))


def test_chrf_is_about_characters():
  # Of 3 characters 2, of 2 pairs 1, of 1 triple none, in both directions.
  found = score('chrf', ['abc'], ['abd'])
  assert found == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_scores_come_in_order_with_how_they_were_computed():
  made = make_scores('exact_match,bleu', 'intl')
  assert list(made) == ['exact_match', 'bleu']
  made['bleu'].compute(['a'], ['a'])
  assert 'tok:intl' in made['bleu'].signature()


def test_names_that_do_not_exist():
  with pytest.raises(ValueError, match="'rouge'; did you mean 'rouge_l'"):
    make_scores('bleu,rouge')
  with pytest.raises(ValueError, match=r"bleu_tokenizer '13b'.*'13a'"):
    make_scores('bleu', '13b')
