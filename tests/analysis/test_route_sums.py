"""Sums over a trace, and findings from them: by hand, and by loops."""

import collections
import itertools
import math

import numpy as np
import pytest

from moe_jax.analysis import (
  route_churn,
  route_findings,
  route_lines,
  route_sums,
  route_tables,
)
from moe_jax.analysis.traces import (
  Header,
  LayerChoices,
  LayerInfo,
  Record,
)

B, T, V, E, K = 3, 20, 11, 5, 2


def make_header(**changes):
  layers = {1: LayerInfo(E, K), 4: LayerInfo(E + 2, K)}
  fields = {'layers': layers, 'vocab_size': V, 'seq_len': T}
  return Header(**fields | {'sources': ('code', 'prose')} | changes)


def random_choices(rng, num_experts, real, K=K):
  """Random choices without an expert twice, some of them dropped."""
  expert = np.argsort(rng.random((*real.shape, num_experts)), -1)[..., :K]
  expert = np.where(real[..., None], expert, -1).astype(np.int32)
  kept = (rng.random(expert.shape) < 0.7) & (expert >= 0)
  gate = np.where(kept, rng.random(expert.shape), 0).astype(np.float32)
  return LayerChoices(expert, gate, kept)


def make_record(step=0, seed=0, **changes):
  """Random choices in rows of two documents, the last places padding."""
  rng = np.random.default_rng((seed, step))
  documents = np.tile(1 + (np.arange(T) >= 8), (B, 1)).astype(np.int32)
  documents[:, 17:] = 0
  positions = np.tile(np.arange(T), (B, 1)) - 8 * (documents == 2)
  sources = (documents == 2).astype(np.int32)
  tokens = rng.integers(0, V, (B, T)).astype(np.int32)
  experts = {1: E, 4: E + 2}
  layers = {
    n: random_choices(rng, e, documents > 0) for n, e in experts.items()
  }
  batch = tokens, positions.astype(np.int32), documents
  base_record = Record('train', step, 0, *batch, layers, sources)
  return base_record._replace(**changes)


def real_tokens(record):
  return zip(*np.nonzero(record.documents), strict=True)


def test_tables_are_those_of_a_loop():
  records = [make_record(step) for step in (0, 5)]
  sums = route_sums.collect(make_header(), records, (0, 5))
  assert (sums.records, sums.tokens) == (2, 2 * B * 17)
  counts = collections.Counter()
  for record, (b, t) in ((r, p) for r in records for p in real_tokens(r)):
    expert, kept = record.layers[4].expert[b, t], record.layers[4].kept[b, t]
    counts.update(('load', e) for e in expert)
    counts.update(('kept', e) for e in expert[kept])
    counts['tokens', record.tokens[b, t], expert[0]] += 1
    counts['positions', record.positions[b, t], expert[0]] += 1
    counts['time', int(record.step == 5), expert[0]] += 1
    counts['time', int(record.step == 5), expert[1]] += 1
    counts['following', record.layers[1].expert[b, t, 0], expert[0]] += 1
    counts['source', record.sources[b, t], expert[0]] += 1
    for rank in range(K):
      counts['rank', rank, 0] += 1
      counts['rank', rank, 1] += not kept[rank]
  layer = sums.layers[4]
  tables = {
    'load': layer.load,
    'kept': layer.kept,
    'tokens': layer.tokens,
    'positions': layer.positions,
    'time': layer.over_time,
    'following': layer.following,
    'source': layer.documents.tables()[0],
    'rank': layer.by_rank,
  }
  for name, table in tables.items():
    expected = np.zeros(table.shape, int)
    for key, count in counts.items():
      if key[0] == name:
        expected[key[1:]] += count
    np.testing.assert_array_equal(table, expected, err_msg=name)
  np.testing.assert_array_equal(layer.first, layer.tokens.sum(0))
  assert sums.times.tolist() == [0, 5]
  assert [row['unused_experts'] for row in layer.evenness] == [0, 0]


def test_repeats_and_drops_of_a_loop():
  record = make_record()
  layer = route_sums.collect(make_header(), [record]).layers[1]
  pairs = same_first = common = different = 0
  for b, t in itertools.product(range(B), range(1, 17)):
    if t == 8:  # the first token of the second document
      continue
    expert = record.layers[1].expert[b]
    pairs += 1
    same_first += expert[t, 0] == expert[t - 1, 0]
    common += bool({*expert[t]} & {*expert[t - 1]})
    differs = record.tokens[b, t] != record.tokens[b, t - 1]
    different += differs and expert[t, 0] == expert[t - 1, 0]
  assert layer.repeats == (pairs, same_first, common)
  assert layer.different.first == different
  assert layer.chance.pairs == pairs
  persistence = route_findings.persistence(layer)
  assert persistence.first == same_first / pairs
  assert persistence.first_uniform == 1 / E
  kept, real = record.layers[1].kept, record.documents > 0
  halves = [1 - kept[:, :10].mean(), 1 - kept[:, 10:17].mean()]
  rates = route_findings.drop_rates(layer.by_column, 2)
  np.testing.assert_allclose(rates, halves)
  is_unserved = ~kept.any(-1)[real]
  unserved_rate = is_unserved.mean()
  assert route_findings.unserved_rates(layer.by_column, 1) == [unserved_rate]


@pytest.mark.parametrize('length', [2, 3])
def test_each_sequence_is_cut_by_its_own_length(length):
  layers = {1: LayerInfo(E, K, sequence='encoder'), 4: LayerInfo(E + 2, K)}
  record = make_record()
  encoder = record._replace(sequence='encoder', layers={1: record.layers[1]})
  short_fields = {
    name: getattr(record, name)[:, :length]
    for name in ('tokens', 'positions', 'documents', 'sources')
  }
  short_choices = LayerChoices(*(x[:, :length] for x in record.layers[4][:3]))
  decoder = record._replace(**short_fields, layers={4: short_choices})
  sums = route_sums.collect(
    make_header(layers=layers, seq_len=length), [encoder, decoder]
  )
  assert [len(s.by_column) for s in sums.layers.values()] == [T, length]
  np.testing.assert_array_equal(
    sums.layers[1].by_column[:, 0], [B] * 17 + [0] * 3
  )
  rates = route_findings.drop_rates(sums.layers[4].by_column, 4)
  assert np.isnan(rates).tolist() == [i >= length for i in range(4)]
  assert len(route_tables.drop_table(sums).rows) == 2
  first, *_ = route_lines.drop_figure(sums).axes
  ends = [line.get_xdata()[-1] for line in first.lines]
  assert ends == [T - 0.5, length - 0.5]


def record_of_first(first, tokens, **changes):
  """A record whose first choices are given, with gates of 3/4 and 1/4."""
  second = (first + 1) % E
  expert = np.stack([first, second], -1).astype(np.int32)
  gate = np.tile(np.float32([0.75, 0.25]), (*first.shape, 1))
  choices = LayerChoices(expert, gate, np.ones(expert.shape, bool))
  ones = np.ones_like(tokens)
  positions = np.tile(
    np.arange(tokens.shape[1], dtype=np.int32), (len(first), 1)
  )
  base_record = Record('train', 0, 0, tokens, positions, ones, {1: choices})
  return base_record._replace(**changes)


def test_token_ids_that_decide():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, V, (40, 30)).astype(np.int32)
  header = make_header(layers={1: LayerInfo(E, K)}, seq_len=30, sources=())
  sums = route_sums.collect(header, [record_of_first(tokens % E, tokens)])
  information = route_findings.specialisation(sums)
  by_id, by_position = (information['token id'][1], information['position'][1])
  assert by_id.mutual == pytest.approx(by_id.entropy)
  assert by_id.adjusted == pytest.approx(1)
  assert by_id.accuracy == 1
  assert abs(by_position.net) < 5 * by_position.deviation < 0.03
  # Tokens 2 and 7 go to expert 2; tokens 3 and 4 to two experts.
  entropy = route_findings.token_entropy
  assert entropy(sums.layers[1], [2, 7]) == pytest.approx(0)
  assert entropy(sums.layers[1], [3, 4]) == pytest.approx(math.log(2), abs=0.1)
  gates = route_findings.gates(sums.layers[1])
  assert gates.means == (0.75, 0.25)
  assert gates.median == pytest.approx(0.76)  # the end of its bin
  with pytest.raises(ValueError, match='from -1 to 3 not in'):
    entropy(sums.layers[1], [-1, 3])


def test_layers_that_follow_each_other():
  record = make_record()
  expert = record.layers[1].expert
  mirrored = record.layers[1]._replace(
    expert=np.where(expert < 0, -1, 4 - expert)
  )
  sums = route_sums.collect(
    make_header(),
    [record._replace(layers={1: record.layers[1], 4: mirrored})],
  )
  (information,) = route_findings.transitions(sums).values()
  assert information.accuracy == 1
  assert information.mutual == pytest.approx(information.entropy)
  assert route_findings.find(sums).following.keys() == {4}


def test_experts_that_choose():
  # Token 0 is chosen by experts 3 and 1, in the order of numbers; the gate of 3
  # is larger. Token 1 is chosen by none, token 2 by expert 0.
  expert = np.array([[[1, 3], [-1, -1], [0, -1]]], np.int32)
  gate = np.array([[[0.2, 0.6], [0, 0], [0.5, 0]]], np.float32)
  choices = LayerChoices(expert, gate, expert >= 0)
  tokens = np.array([[5, 6, 6]], np.int32)
  positions = np.arange(3, dtype=np.int32)[None]
  record = Record(
    'train', 0, 0, tokens, positions, 1 + 0 * tokens, {0: choices}
  )
  header = make_header(layers={0: LayerInfo(E, 1, by_expert=True)}, sources=())
  layer = route_sums.collect(header, [record]).layers[0]
  np.testing.assert_array_equal(layer.first, [1, 0, 0, 1, 0])
  np.testing.assert_array_equal(layer.load, [1, 1, 0, 1, 0])
  assert layer.tokens[5, 3] == 1
  assert route_findings.gates(layer).means == pytest.approx((0.55, 0.2))
  assert route_findings.unserved_rates(layer.by_column, 1) == [1 / 3]
  assert route_findings.drop_rates(layer.by_column, 1) == [0]
  persistence = route_findings.persistence(layer)
  assert (persistence.pairs, persistence.first_uniform) == (0, 1 / E)
  assert math.isnan(persistence.any_uniform)


def test_logits_give_the_entropy_of_the_router():
  record = make_record()
  logits = np.zeros((B, T, E), np.float32)
  layers = {1: record.layers[1]._replace(logits=logits)}
  layer = route_sums.collect(
    make_header(), [record._replace(layers=layers)]
  ).layers[1]
  gates = route_findings.gates(layer)
  assert gates.router_entropy == pytest.approx(math.log(E))
  assert gates.router_share == pytest.approx(1)


def test_the_entropy_of_a_router_is_a_share_of_that_of_all_its_columns():
  # Twice as many columns as experts, as in a run that was merged.
  record = make_record()
  logits = np.zeros((B, T, 2 * E), np.float32)
  layers = {1: record.layers[1]._replace(logits=logits)}
  sums = route_sums.collect(make_header(), [record._replace(layers=layers)])
  row = route_tables.gate_table(sums).rows[0]
  assert row[-2:] == pytest.approx([math.log(2 * E), 1])


def test_labels_of_sources():
  sums = route_sums.collect(make_header(), [make_record()])
  labels = {'language': {'code': 'Python', 'prose': 'English'}}
  information = route_findings.specialisation(sums, labels)
  assert [*information] == ['token id', 'position', 'source', 'language']
  by_source, by_language = information['source'][4], information['language'][4]
  assert by_source.mutual == pytest.approx(by_language.mutual)
  with pytest.raises(ValueError, match='each needs one'):
    route_findings.specialisation(sums, {'language': {'code': 'Python'}})
  unlabelled_sums = route_sums.collect(
    make_header(sources=()), [make_record(sources=None)]
  )
  with pytest.raises(ValueError, match='this trace has none'):
    route_findings.specialisation(unlabelled_sums, labels)


def test_no_records():
  with pytest.raises(ValueError, match='no records'):
    route_sums.collect(make_header(), [])


def test_agreement_by_hand():
  # Four tokens: the same choices; the same in another order; one in common;
  # none in common. The last place is padding.
  experts = np.array([[0, 1], [2, 3], [0, 4], [0, 1], [-1, -1]], np.int32)
  other_experts = np.array([[0, 1], [3, 2], [0, 2], [2, 3], [-1, -1]], np.int32)
  real = np.array([[True] * 4 + [False]])
  a, b = (
    LayerChoices(x[None], np.ones((1, 5, 2), np.float32), x[None] >= 0)
    for x in (experts, other_experts)
  )
  agreement = route_churn.agreement_of(a, b, real)
  assert agreement == (4, 2, 2, 16, 10)
  assert (agreement.churn, agreement.churn_all, agreement.overlap) == (
    0.5,
    0.5,
    0.625,
  )


def test_other_tokens_are_not_compared():
  record, other_record = make_record(0), make_record(5)
  assert route_churn.agreement(make_header(), [record], [record])[1].churn == 0
  with pytest.raises(ValueError, match=r'step 0 and .* hold different tokens'):
    route_churn.agreement(make_header(), [record], [other_record])
  with pytest.raises(ValueError, match=r'batch 1 .* has no counterpart'):
    route_churn.agreement(
      make_header(), [record], [record, record._replace(batch=1)]
    )
  with pytest.raises(ValueError, match='cannot be compared with batch 2'):
    route_churn.agreement(make_header(), [record], [record._replace(batch=2)])
