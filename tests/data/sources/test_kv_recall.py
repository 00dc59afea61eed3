"""KV-RECALL: the same random pairs in both splits, packed into short rows."""

import collections

import numpy as np
import pytest

from moe_jax.data import DataConfig, batch_dataset, load
from moe_jax.data.sources import kv_recall
from moe_jax.data.sources.pairs import PairSelection, open_pairs

EOS = 256


def pairs(source, split):
  return list(source.pairs(split))


def test_keys_are_unique_and_all_letters_as_likely():
  found = kv_recall.pairs(3000, 'train')
  assert len(dict(found)) == 3000
  for letters, size in (([k for k, _ in found], 6), ([v for _, v in found], 4)):
    assert {len(text) for text in letters} == {size}
    for place in range(size):
      counts = collections.Counter(text[place] for text in letters)
      assert set(counts) == set(kv_recall.LETTERS)
      # Five standard deviations of a fair draw.
      assert max(counts.values()) < 3000 / 16 + 5 * np.sqrt(3000 / 16)


def test_pairs_are_the_same_on_every_machine():
  # A change that moves these has to move FORMAT: cached tokens are of it.
  assert kv_recall.FORMAT == 1
  expected = [('fgidkf', 'mkol'), ('mamjhi', 'fcmg')]
  assert kv_recall.pairs(2, 'train') == expected


def test_both_splits_have_the_same_pairs_in_another_order():
  source = open_pairs('kv_recall:200')
  train, validation = pairs(source, 'train'), pairs(source, 'validation')
  assert train != validation
  assert sorted(train) == sorted(validation)
  assert train == pairs(open_pairs('kv_recall:200'), 'train')
  assert set(train) < set(pairs(open_pairs('kv_recall:300'), 'train'))
  swapped = open_pairs('kv_recall:200', PairSelection(('validation', 'train')))
  assert pairs(swapped, 'train') == validation


def test_a_key_that_is_drawn_twice_keeps_its_first_value():
  drawn = [('aa', 'x'), ('bb', 'y'), ('aa', 'z'), ('cc', 'x'), ('dd', 'y')]
  found = kv_recall.distinct(drawn, 3)
  assert found == {'aa': 'x', 'bb': 'y', 'cc': 'x'}


def test_identity_and_name():
  source = open_pairs('kv_recall:200')
  assert source.name.startswith('synthetic: 200 random keys and values')
  others = [
    open_pairs('kv_recall:201'),
    open_pairs('kv_recall:200', PairSelection(input_prefix='say ')),
    open_pairs('kv_recall:200'),
  ]
  identities = [source.identity, *(s.identity for s in others)]
  assert len(set(identities)) == 3 and identities[0] == identities[3]
  assert pairs(others[1], 'train')[0][0].startswith('say ')


def test_five_pairs_share_a_row_and_an_epoch_has_every_pair_once():
  dataset = load(DataConfig('kv_recall:60', 'bytes', 64, task='seq2seq'))
  assert 'data: synthetic: 60 random keys' in dataset.describe()
  rows = dataset.splits['train']
  assert len(rows) == 12 and rows.truncated == 0
  source = open_pairs('kv_recall:60')
  row = rows[0]
  for i, (key, value) in enumerate(pairs(source, 'train')[:5]):
    # The key and its end, then the value, whose end is a target alone.
    mine = row['segment_ids'] == i + 1
    text = [*key.encode(), EOS, *value.encode(), EOS]
    assert row['tokens'][mine].tolist() == text[:-1]
    assert row['targets'][mine].tolist() == text[1:]
    assert row['loss_weights'][mine].tolist() == [0] * 6 + [1] * 5
  assert not row['loss_weights'][55:].any()
  batches = batch_dataset(rows, batch_size=4, seed=1)
  epochs = [[batches[3 * e + i] for i in range(3)] for e in range(2)]
  seen = [
    [tuple(row) for batch in epoch for row in batch['tokens'][:, :6].tolist()]
    for epoch in epochs
  ]
  assert sorted(seen[0]) == sorted(seen[1]) and seen[0] != seen[1]
  assert len(set(seen[0])) == 12


@pytest.mark.parametrize('count', ['0', '-3', '1048577'])
def test_the_number_of_pairs_has_bounds(count):
  message = rf'N={count} pairs of kv_recall not in \[1, 1048576\]'
  with pytest.raises(ValueError, match=message):
    open_pairs(f'kv_recall:{count}')


def test_what_is_no_number_and_what_has_no_such_split():
  with pytest.raises(ValueError, match="'kv_recall:4k' is not 'kv_recall:<N>'"):
    open_pairs('kv_recall:4k')
  with pytest.raises(ValueError, match=r"kv_recall 'test'.*'validation'"):
    open_pairs('kv_recall:4', PairSelection(('train', 'test')))
  with pytest.raises(ValueError, match=r'source of pairs .*kv_recall:<N>'):
    open_pairs('kv_recall:')


def test_texts_are_not_read_from_pairs():
  with pytest.raises(ValueError, match="'kv_recall:4' has pairs"):
    load(DataConfig('kv_recall:4', 'bytes', 64))
