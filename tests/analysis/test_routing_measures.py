"""Measures of routing: by hand, and by loops that are the definition."""

import collections
import itertools
import math

import numpy as np
import pytest

from moe_jax.analysis import routing_measures as measures
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record
from tests.analysis.random_choices import random_choices

RNG = np.random.default_rng(0)
B, T, V, E, K = 3, 20, 11, 5, 2


LAYERS = {1: LayerInfo(E, K), 4: LayerInfo(E + 2, K)}


def make_header(**changes):
  fields = {'layers': LAYERS, 'vocab_size': V, 'seq_len': T}
  return Header(**fields | {'sources': ('code', 'prose')} | changes)


def make_record(step=0, **changes):
  """Random choices in rows of two documents, the last places padding."""
  rng = np.random.default_rng(step)
  documents = np.tile(1 + (np.arange(T) >= 8), (B, 1)).astype(np.int32)
  documents[:, 17:] = 0
  positions = np.tile(np.arange(T), (B, 1)) - 8 * (documents == 2)
  sources = (documents == 2).astype(np.int32)
  tokens = rng.integers(0, V, (B, T)).astype(np.int32)
  layers = {
    n: random_choices(rng, info, documents > 0) for n, info in LAYERS.items()
  }
  batch = tokens, positions.astype(np.int32), documents
  base_record = Record('train', step, 0, *batch, layers, sources)
  return base_record._replace(**changes)


def test_tokens_of_a_batch():
  # Two rows of five places. The first holds a document of three tokens and one
  # of two; the second one of three tokens, then padding.
  record = Record(
    'train',
    0,
    0,
    tokens=np.array([[7, 8, 9, 7, 7], [4, 4, 5, 0, 0]], np.int32),
    positions=np.array([[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]], np.int32),
    documents=np.array([[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]], np.int32),
    layers={},
    sources=np.array([[2, 2, 2, 0, 0], [1, 1, 1, 0, 0]], np.int32),
  )
  tokens = measures.real_tokens([record, record], RNG)
  assert tokens.token.tolist() == 2 * [7, 8, 9, 7, 7, 4, 4, 5]
  assert tokens.column.tolist() == 2 * [0, 1, 2, 3, 4, 0, 1, 2]
  assert tokens.position.tolist() == 2 * [0, 1, 2, 0, 1, 0, 1, 2]
  document = [0, 0, 0, 1, 1, 2, 2, 2]
  assert tokens.document.tolist() == [*document, *(i + 3 for i in document)]
  assert tokens.source.tolist() == 2 * [2, 0, 1]
  # Neither the first token of a document nor that of a row follows another.
  after = [1, 2, 4, 6, 7]
  assert tokens.after.tolist() == [*after, *(i + 8 for i in after)]
  # Strangers are other tokens of the same batch.
  assert (tokens.stranger != tokens.after).all()
  assert (tokens.stranger // 8 == tokens.after // 8).all()
  without = measures.real_tokens([record._replace(sources=None)], RNG)
  assert without.source is None
  padding = record._replace(documents=np.zeros((2, 5), np.int32))
  empty = measures.real_tokens([padding], RNG)
  assert [len(values) for values in empty] == [0] * 8


def test_tables_are_those_of_a_loop():
  records = [make_record(step) for step in (0, 5)]
  layers = measures.layers_of(make_header(), records)
  counts = collections.Counter()
  for record in records:
    for b, t in zip(*np.nonzero(record.documents), strict=True):
      expert, kept = record.layers[4].expert[b, t], record.layers[4].kept[b, t]
      counts.update(('load', e) for e in expert)
      counts.update(('pairs', *p) for p in itertools.permutations(expert))
      counts['tokens', record.tokens[b, t], expert[0]] += 1
      counts['following', record.layers[1].expert[b, t, 0], expert[0]] += 1
      for rank in range(K):
        counts['dropped', rank] += not kept[rank]
  layer, N = layers[4], 2 * B * 17
  tables = {
    'load': layer.load,
    'pairs': measures.pair_counts(layer.expert, E + 2),
    'tokens': layer.by_token,
    'following': measures.flows(layers)[1, 4],
    'dropped': N * measures.drop_rates_by_rank(layer.expert, layer.kept),
  }
  for name, table in tables.items():
    expected = np.zeros(table.shape)
    for key, count in counts.items():
      if key[0] == name:
        expected[key[1:]] += count
    np.testing.assert_allclose(table, expected, err_msg=name)


def test_repeats_and_drops_of_a_loop():
  record = make_record()
  layer = measures.layers_of(make_header(), [record])[1]
  pairs = same_first = common = different = differing = 0
  for b, t in itertools.product(range(B), range(1, 17)):
    if t == 8:  # the first token of the second document
      continue
    expert = record.layers[1].expert[b]
    pairs += 1
    same_first += expert[t, 0] == expert[t - 1, 0]
    common += bool({*expert[t]} & {*expert[t - 1]})
    differs = record.tokens[b, t] != record.tokens[b, t - 1]
    differing += differs
    different += differs and expert[t, 0] == expert[t - 1, 0]
  persistence = measures.persistence(layer)
  assert persistence.pairs == pairs
  assert persistence.first == same_first / pairs
  assert persistence.any == common / pairs
  assert persistence.different == different / differing
  assert persistence.first_uniform == 1 / E
  kept, real = record.layers[1].kept, record.documents > 0
  part = measures.parts_of(layer.tokens.column, T, 2)
  rates = measures.drop_rates(layer.expert, layer.kept, part, 2)
  halves = [1 - kept[:, :10].mean(), 1 - kept[:, 10:17].mean()]
  np.testing.assert_allclose(rates, halves)
  unserved = measures.unserved_rate(layer.expert, layer.kept)
  assert unserved == pytest.approx((~kept.any(-1)[real]).mean())


def test_experts_that_choose():
  # Token 0 is chosen by experts 3 and 1, whose gate is smaller. Token 1 is
  # chosen by none, token 2 by expert 0, and in another batch by one alone.
  expert = np.array([[[3, 1], [-1, -1], [0, -1]]], np.int32)
  gate = np.array([[[0.6, 0.2], [0, 0], [0.5, 0]]], np.float32)
  ids = np.array([[5, 6, 6]], np.int32)
  positions, ones = np.arange(3, dtype=np.int32)[None], np.ones_like(ids)
  records = [
    Record(
      'train', 0, i, ids, positions, ones,
      {0: LayerChoices(expert[..., :k], gate[..., :k], expert[..., :k] >= 0)},
    )
    for i, k in enumerate((2, 1))
  ]  # fmt: skip
  header = make_header(layers={0: LayerInfo(E, 1, by_expert=True)}, sources=())
  layer = measures.layers_of(header, records)[0]
  assert layer.load.tolist() == [2, 1, 0, 2, 0]
  assert layer.by_token[5].tolist() == [0, 0, 0, 2, 0]
  unserved = measures.unserved_rate(layer.expert, layer.kept)
  assert unserved == pytest.approx(1 / 3)
  assert measures.drop_rates(layer.expert, layer.kept) == [0]
  assert math.isnan(measures.persistence(layer).any_uniform)


def test_entropies():
  assert measures.load_evenness(np.array([3, 3, 3])) == pytest.approx(1)
  assert measures.load_evenness(np.array([3, 0, 0])) == 0
  assert math.isnan(measures.load_evenness(np.array([3])))
  logits = np.array([[0, 0, 0, 0], [0, 0, -np.inf, -np.inf]], np.float32)
  assert measures.router_evenness(logits) == pytest.approx(0.75)


def test_information_by_hand():
  # Label 0 always goes to expert 0; label 1 to either. Of 4 choices, 3 are of
  # expert 0: H(expert) = -(3/4 ln 3/4 + 1/4 ln 1/4), H(expert | label) is ln 2
  # for half of them.
  table = np.array([[2, 0], [1, 1]])
  entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  information = measures.information(table, RNG)
  assert information.mutual == pytest.approx(entropy - math.log(2) / 2)
  assert information.entropy == pytest.approx(entropy)
  assert information.accuracy == information.base_rate == 0.75
  assert (information.choices, information.labels) == (4, 2)


def test_independent_labels_say_nothing():
  # 90 labels and 16 experts of 3000 choices look as if they knew each other by
  # 89 * 15 / 6000 nats; shuffled labels do so, too.
  code = RNG.integers(0, 90, 3000) * 16 + RNG.integers(0, 16, 3000)
  table = np.bincount(code, minlength=90 * 16).reshape(90, 16)
  information = measures.information(table, RNG)
  assert information.mutual > 0.2
  assert abs(information.net) < 5 * information.deviation < 0.05
  assert abs(information.adjusted) < 0.03


def test_labels_that_determine_the_expert():
  table = np.zeros((12, 4), int)
  table[np.arange(12), np.arange(12) % 4] = RNG.integers(100, 900, 12)
  information = measures.information(table, RNG)
  assert information.mutual == pytest.approx(information.entropy)
  assert information.fraction == pytest.approx(1, abs=0.01)
  # With one choice of each label the label always seems to tell all: shuffles
  # show that it says nothing.
  singles = measures.information(np.eye(5, dtype=int), RNG)
  assert singles.mutual == pytest.approx(singles.entropy)
  assert singles.net == pytest.approx(0, abs=1e-12)
  assert math.isnan(singles.adjusted)
  # A single choice is told by nothing.
  assert measures.information(np.ones((1, 1), int), RNG).net == 0
  # Adjusted, few choices of labels that determine the expert still say all.
  few_choices = measures.information(3 * np.sign(table), RNG)
  assert few_choices.fraction < 0.8
  assert few_choices.adjusted == pytest.approx(1)


def test_labels_of_documents_are_shuffled_as_documents():
  # Four documents of 50 tokens each, of two sources: every document has an
  # expert of its own. Over tokens it would seem that sources matter.
  counts = 50 * np.eye(4, dtype=int)
  information = measures.document_information(np.array([0, 1, 0, 1]), counts, 2)
  assert information.mutual == pytest.approx(math.log(2))
  assert information.net == pytest.approx(0, abs=1e-12)


def test_what_is_told_by_each_label_and_by_the_layer_before():
  record = make_record()
  # Ids decide in layer 1, and its expert decides in layer 4.
  first = np.where(record.documents > 0, record.tokens % E, -1)
  second = np.where(first < 0, -1, 4 - first)
  experts = [x[..., None].astype(np.int32) for x in (first, second)]
  choices = [LayerChoices(x, np.ones(x.shape, 'f4'), x >= 0) for x in experts]
  record = record._replace(layers=dict(zip((1, 4), choices)))
  layers = measures.layers_of(make_header(), [record])
  by_label = measures.specialisation(layers)
  assert [*by_label] == ['token id', 'position', 'source']
  assert by_label['token id'][1].accuracy == 1
  assert by_label['token id'][1].adjusted == pytest.approx(1)
  assert abs(by_label['position'][1].net) < 0.3
  following = measures.transitions(layers)
  assert [*following] == [4] and following[4].accuracy == 1
  few = make_header(sources=('code',))
  layers = measures.layers_of(few, [record])
  assert 'source' not in measures.specialisation(layers)


def test_pairs_by_chance():
  # Pairs with counts w_a w_b stay as they are, however uneven.
  weight = np.array([1, 2, 3, 4])
  pairs = np.outer(weight, weight)
  np.fill_diagonal(pairs, 0)
  np.testing.assert_allclose(measures.expected_pairs(pairs), pairs, rtol=1e-6)
  # Pairs that avoid each other keep their sums, but not their places.
  split = np.zeros((5, 5), int)
  split[0, 1] = split[1, 0] = split[2, 3] = split[3, 2] = 9
  expected = measures.expected_pairs(split)
  np.testing.assert_allclose(expected.sum(1), split.sum(1))
  np.testing.assert_allclose(expected[0, 1:4], 3)


def test_repeats_of_mixtral():
  # Section 5 of arXiv:2401.04088: 12.5 % and 46 % for two of eight experts.
  first, common = measures.uniform_repeats(8, 2)
  assert first == 0.125
  assert common == pytest.approx(0.464, abs=5e-4)


def test_churn_by_hand():
  # Four tokens: the same choices; the same in another order; one in common;
  # none in common. The fifth one has no choice, and the last one is padding.
  one = np.array([[0, 1], [2, 3], [0, 4], [0, 1], [-1, -1], [0, 1]])
  other = np.array([[0, 1], [3, 2], [0, 2], [2, 3], [-1, -1], [1, 0]])
  ids = np.zeros((1, 6), np.int32)
  documents = np.array([[1, 1, 1, 1, 1, 0]], np.int32)
  layers = [{3: LayerChoices(x, x, x > 0)} for x in (one[None], other[None])]
  records = [
    Record('valid', i, 0, ids, ids, documents, layers[i]) for i in (0, 1)
  ]
  assert measures.churn(records[:1], records[1:]) == {3: 0.5}
  empty = [r._replace(documents=0 * documents) for r in records]
  assert math.isnan(measures.churn(empty[:1], empty[1:])[3])


def test_other_tokens_are_not_compared():
  record, other_record = make_record(0), make_record(5)
  assert measures.churn([record], [record]) == {1: 0, 4: 0}
  for others in ([other_record], [record, record._replace(batch=1)]):
    with pytest.raises(ValueError, match='cannot be compared'):
      measures.churn([record], others)
