"""The KV-RECALL source: equal random pairs in both splits, in short rows."""

from experiments.study import kv_recall
from experiments.study.kv_recall import KvRecallSource
from moe_jax.data import DataOptions, Selection, Seq2SeqTask, load

EOS = 256


def pairs(source, split):
  return list(source.pairs(split))


def test_pairs_are_the_same_on_every_machine():
  # If these values change, FORMAT must change too, since cached tokens depend
  # on them.
  assert kv_recall.FORMAT == 1
  expected = [('fgidkf', 'mkol'), ('mamjhi', 'fcmg')]
  assert kv_recall.pairs(2, 'train') == expected


def test_a_key_that_is_drawn_twice_keeps_its_first_value():
  draws = [('aa', 'x'), ('bb', 'y'), ('aa', 'z'), ('cc', 'x'), ('dd', 'y')]
  value_of = kv_recall.distinct(draws, 3)
  assert value_of == {'aa': 'x', 'bb': 'y', 'cc': 'x'}


def test_both_splits_have_the_same_pairs_in_another_order():
  source = KvRecallSource(200).pairs()
  train, validation = pairs(source, 'train'), pairs(source, 'validation')
  assert train != validation and sorted(train) == sorted(validation)
  assert set(train) < set(pairs(KvRecallSource(300).pairs(), 'train'))
  swapped = KvRecallSource(200).pairs(Selection(('validation', 'train')))
  assert pairs(swapped, 'train') == validation
  # What is cached belongs to the number of pairs, and to a prefix.
  others = [KvRecallSource(201).pairs(), source.with_prefix('say ')]
  assert len({s.identity for s in (source, *others)}) == 3
  assert source.identity == KvRecallSource(200).pairs().identity
  assert pairs(others[1], 'train')[0][0].startswith('say ')


def test_five_pairs_share_a_row():
  source, task = KvRecallSource(60), Seq2SeqTask()
  dataset = load(DataOptions(source=source, seq_len=64, task=task))
  rows = dataset.splits['train']
  assert len(rows) == 12 and rows.truncated == 0
  row = rows[0]
  key, value = pairs(source.pairs(), 'train')[4]
  # A row has the key with its end, then the value, whose end is a target only.
  in_segment = row['segment_ids'] == 5
  token_ids = [*key.encode(), EOS, *value.encode(), EOS]
  assert row['tokens'][in_segment].tolist() == token_ids[:-1]
  assert row['targets'][in_segment].tolist() == token_ids[1:]
  assert row['loss_weights'][in_segment].tolist() == [0] * 6 + [1] * 5
