"""Information, pairs by chance and repeats by chance, by hand and by loops."""

import itertools
import math

import numpy as np
import pytest

from moe_jax.analysis import route_labels, route_measures

RNG = np.random.default_rng(0)


def test_information_by_hand():
  # Label 0 always goes to expert 0; label 1 to either. Of 4 choices, 3 are of
  # expert 0: H(expert) = -(3/4 ln 3/4 + 1/4 ln 1/4), H(expert | label) is ln 2
  # for half of them.
  table = np.array([[2, 0], [1, 1]])
  entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  mutual = route_measures.mutual_information(table)
  assert mutual == pytest.approx(entropy - math.log(2) / 2)
  information = route_measures.information(table, RNG)
  assert information.entropy == pytest.approx(entropy)
  assert information.accuracy == information.base_rate == 0.75
  assert (information.choices, information.labels) == (4, 2)


def test_information_is_that_of_a_loop():
  table = RNG.integers(0, 5, (7, 4))
  total, mutual = table.sum(), 0.0
  for i, j in itertools.product(range(7), range(4)):
    if table[i, j]:
      ratio = table[i, j] * total / (table[i].sum() * table[:, j].sum())
      mutual += table[i, j] / total * math.log(ratio)
  assert route_measures.mutual_information(table) == pytest.approx(mutual)


def test_independent_labels_say_nothing():
  # 90 labels and 16 experts of 3000 choices look as if they knew each other by
  # 89 * 15 / 6000 nats; shuffled labels do so, too.
  code = RNG.integers(0, 90, 3000) * 16 + RNG.integers(0, 16, 3000)
  table = np.bincount(code, minlength=90 * 16).reshape(90, 16)
  information = route_measures.information(table, RNG)
  assert information.mutual > 0.2
  assert abs(information.net) < 5 * information.deviation < 0.05
  assert abs(information.adjusted) < 0.03
  assert abs(information.accuracy - information.accuracy_shuffled) < 0.03


def test_labels_that_determine_the_expert():
  table = np.zeros((12, 4), int)
  table[np.arange(12), np.arange(12) % 4] = RNG.integers(100, 900, 12)
  information = route_measures.information(table, RNG)
  assert information.mutual == pytest.approx(information.entropy)
  assert information.fraction == pytest.approx(1, abs=0.01)
  # With one choice of each label the label always seems to tell all: shuffles
  # show that it says nothing.
  singles = route_measures.information(np.eye(5, dtype=int), RNG)
  assert singles.mutual == pytest.approx(singles.entropy)
  assert singles.net == pytest.approx(0, abs=1e-12)
  assert math.isnan(singles.adjusted)
  # Adjusted, few choices of labels that determine the expert still say all.
  few_choices = route_measures.information(3 * np.sign(table), RNG)
  assert few_choices.fraction < 0.8
  assert few_choices.adjusted == pytest.approx(1)


@pytest.mark.parametrize('table', [np.zeros((3, 4), int), np.ones((1, 1), int)])
def test_information_of_nothing(table):
  information = route_measures.information(table, RNG)
  assert information.net == information.deviation == 0


def test_a_shuffle_at_least():
  with pytest.raises(ValueError, match='num_shuffles=0'):
    route_measures.information(np.ones((2, 2), int), RNG, num_shuffles=0)


def test_pairs_by_chance():
  # With even loads all pairs are equally likely.
  even = 6 * (1 - np.eye(4, dtype=int))
  np.testing.assert_allclose(route_measures.expected_pairs(even), even)
  # Pairs with counts w_a w_b stay as they are, however uneven.
  weight = np.array([1, 2, 3, 4])
  pairs = np.outer(weight, weight)
  np.fill_diagonal(pairs, 0)
  expected = route_measures.expected_pairs(pairs)
  np.testing.assert_allclose(expected, pairs, rtol=1e-6)
  assert route_measures.relative_entropy(pairs, expected) < 1e-12
  # Pairs that avoid each other keep their sums, but not their places.
  split = np.zeros((5, 5), int)
  split[0, 1] = split[1, 0] = split[2, 3] = split[3, 2] = 9
  expected = route_measures.expected_pairs(split)
  np.testing.assert_allclose(expected.sum(1), split.sum(1))
  np.testing.assert_allclose(expected[0, 1:4], 3)
  divergence = route_measures.relative_entropy(split, expected)
  assert divergence == pytest.approx(math.log(3))


def test_an_expert_in_every_pair():
  star = np.zeros((4, 4), int)
  star[0, 1:] = star[1:, 0] = [5, 2, 1]
  expected = route_measures.expected_pairs(star)
  np.testing.assert_allclose(expected.sum(1), star.sum(1), rtol=0.02)


def test_repeats_of_mixtral():
  # Section 5 of arXiv:2401.04088: 12.5 % and 46 % for two of eight experts.
  first, common = route_measures.uniform_repeats(8, 2)
  assert first == 0.125
  assert common == pytest.approx(0.464, abs=5e-4)
  sets = [*itertools.combinations(range(6), 3)]
  overlaps = [bool({*a} & {*b}) for a, b in itertools.product(sets, sets)]
  assert route_measures.uniform_repeats(6, 3)[1] == pytest.approx(
    np.mean(overlaps)
  )
  with pytest.raises(ValueError, match='num_selected=9 not in'):
    route_measures.uniform_repeats(8, 9)


def test_percentiles_of_load():
  percentiles = route_measures.load_percentiles(np.array([0, 1, 2, 3, 4]))
  assert (percentiles[0], percentiles[50], percentiles[100]) == (0, 1, 2)
  assert math.isnan(route_measures.load_percentiles(np.zeros(3))[50])


def test_labels_of_documents_are_shuffled_as_documents():
  # Four documents of 50 tokens each, of two sources: every document has an
  # expert of its own. Over tokens it would seem that sources matter.
  sums = route_labels.LabelledDocuments(2, 4, num_shuffles=20)
  sums.add(np.array([0, 1]), np.diag([50, 50, 0, 0])[:2])
  sums.add(np.array([0, 1]), np.diag([0, 0, 50, 50])[2:])
  table, shuffled = sums.tables()
  np.testing.assert_array_equal(table, [[50, 0, 50, 0], [0, 50, 0, 50]])
  assert (shuffled.sum((1, 2)) == 200).all()
  information = route_measures.information_of(table, shuffled)
  assert information.mutual == pytest.approx(math.log(2))
  assert information.net == pytest.approx(0, abs=1e-12)


def test_sources_with_one_label_are_summed():
  table = np.array([[1, 2], [3, 4], [5, 6]])
  labels = {'a': 'one', 'b': 'two', 'c': 'one'}
  grouped_table, names = route_labels.grouped(table, ['a', 'b', 'c'], labels)
  np.testing.assert_array_equal(grouped_table, [[6, 8], [3, 4]])
  assert names == ['one', 'two']
  with pytest.raises(ValueError, match=r"given to .'a'.*sources are .'a', 'b'"):
    route_labels.grouped(table, ['a', 'b'], {'a': 'one'})


def test_labels_as_text():
  parsed_labels = route_labels.read_labels(
    'language=web:de:German,books:English'
  )
  label_of_source = {'web:de': 'German', 'books': 'English'}
  assert parsed_labels == ('language', label_of_source)
  for text in ('', 'language', 'language=', 'language=web', '=web:German'):
    with pytest.raises(ValueError, match='not of the form'):
      route_labels.read_labels(text)
  with pytest.raises(ValueError, match='a source twice'):
    route_labels.read_labels('language=a:x,a:y')
