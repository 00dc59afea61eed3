"""The KV-RECALL source: equal random pairs in both splits, in short rows."""

import collections

import numpy as np
import pytest

from experiments.study import kv_recall
from experiments.study.kv_recall import KvRecallSource
from moe_jax.data import (
  DataOptions,
  Selection,
  Seq2SeqTask,
  batch_dataset,
  load,
)

EOS = 256


def pairs(source, split):
  return list(source.pairs(split))


def test_keys_are_unique_and_all_letters_as_likely():
  keys_and_values = kv_recall.pairs(3000, 'train')
  assert len(dict(keys_and_values)) == 3000
  for letters, size in (
    ([k for k, _ in keys_and_values], 6),
    ([v for _, v in keys_and_values], 4),
  ):
    assert {len(text) for text in letters} == {size}
    for position in range(size):
      counts = collections.Counter(text[position] for text in letters)
      assert set(counts) == set(kv_recall.LETTERS)
      # The tolerance is five standard deviations of a uniform draw.
      assert max(counts.values()) < 3000 / 16 + 5 * np.sqrt(3000 / 16)


def test_pairs_are_the_same_on_every_machine():
  # If these values change, FORMAT must change too, since cached tokens depend
  # on them.
  assert kv_recall.FORMAT == 1
  expected = [('fgidkf', 'mkol'), ('mamjhi', 'fcmg')]
  assert kv_recall.pairs(2, 'train') == expected


def test_both_splits_have_the_same_pairs_in_another_order():
  source = KvRecallSource(200).pairs()
  train, validation = pairs(source, 'train'), pairs(source, 'validation')
  assert train != validation
  assert sorted(train) == sorted(validation)
  assert train == pairs(KvRecallSource(200).pairs(), 'train')
  assert set(train) < set(pairs(KvRecallSource(300).pairs(), 'train'))
  swapped = KvRecallSource(200).pairs(Selection(('validation', 'train')))
  assert pairs(swapped, 'train') == validation


def test_a_key_that_is_drawn_twice_keeps_its_first_value():
  draws = [('aa', 'x'), ('bb', 'y'), ('aa', 'z'), ('cc', 'x'), ('dd', 'y')]
  value_of = kv_recall.distinct(draws, 3)
  assert value_of == {'aa': 'x', 'bb': 'y', 'cc': 'x'}


def test_identity_and_name():
  source = KvRecallSource(200).pairs()
  assert source.name.startswith('synthetic: 200 random keys and values')
  other_sources = [
    KvRecallSource(201).pairs(),
    source.with_prefix('say '),
    KvRecallSource(200).pairs(),
  ]
  identities = [source.identity, *(s.identity for s in other_sources)]
  assert len(set(identities)) == 3 and identities[0] == identities[3]
  assert pairs(other_sources[1], 'train')[0][0].startswith('say ')


def test_five_pairs_share_a_row_and_an_epoch_has_every_pair_once():
  dataset = load(
    DataOptions(source=KvRecallSource(60), seq_len=64, task=Seq2SeqTask())
  )
  assert 'data: synthetic: 60 random keys' in dataset.describe()
  rows = dataset.splits['train']
  assert len(rows) == 12 and rows.truncated == 0
  source = KvRecallSource(60).pairs()
  row = rows[0]
  for i, (key, value) in enumerate(pairs(source, 'train')[:5]):
    # A row has the key with its end, then the value, whose end is a target
    # only.
    in_segment = row['segment_ids'] == i + 1
    token_ids = [*key.encode(), EOS, *value.encode(), EOS]
    assert row['tokens'][in_segment].tolist() == token_ids[:-1]
    assert row['targets'][in_segment].tolist() == token_ids[1:]
    assert row['loss_weights'][in_segment].tolist() == [0] * 6 + [1] * 5
  assert not row['loss_weights'][55:].any()
  batches = batch_dataset(rows, batch_size=4, seed=1)
  epochs = [[batches[3 * e + i] for i in range(3)] for e in range(2)]
  orders = [
    [tuple(row) for batch in epoch for row in batch['tokens'][:, :6].tolist()]
    for epoch in epochs
  ]
  assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
  assert len(set(orders[0])) == 12


@pytest.mark.parametrize('count', [0, -3, 1048577])
def test_the_number_of_pairs_has_bounds(count):
  with pytest.raises(ValueError, match=rf'num_pairs={count} not in \[1, 104'):
    KvRecallSource(count)


def test_a_split_of_another_name_is_refused():
  with pytest.raises(ValueError, match=r"kv_recall 'test'.*'validation'"):
    KvRecallSource(4).pairs(Selection(('train', 'test')))
