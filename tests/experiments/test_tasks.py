"""Tasks of studies load with right labels; CIPHER-K and KV-RECALL by hand."""

import pytest

from experiments.study import cipher, kv_recall
from experiments.study.cipher import ALPHABET, MARKS, PIECE, CipherSource
from experiments.study.jobs import layered
from experiments.study.kv_recall import KvRecallSource
from experiments.study.tasks import PREFIX_TASKS, TASKS
from moe_jax import data
from moe_jax.config import read_options
from moe_jax.configs import base
from moe_jax.data import (
  DataOptions,
  PythonStdlibSource,
  Selection,
  Seq2SeqTask,
  load,
)
from moe_jax.run_config import RunConfig


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=[pytest.mark.slow] * (n in ('cipher', 'text')))
    for n in (*TASKS, *PREFIX_TASKS)
  ],
)
def test_a_task_loads_and_says_what_it_is(name):
  task = {**TASKS, **PREFIX_TASKS}[name]
  config = layered(RunConfig, base.get_config(), {'data.seq_len': 64})
  config = layered(RunConfig, config, task.overrides)
  dataset = data.load(read_options(data.DataOptions, config.data, 'data.'))
  synthetic = name != 'text'
  assert dataset.source.startswith('synthetic: ') == synthetic
  assert task.label.startswith('synthetic: ') == synthetic
  # An epoch has more rows than a short run sees, so that none is repeated.
  assert len(dataset.splits['train']) > 200


PART = 'email,json'


def texts(source, split):
  return list(source.texts(split))


def decipher(text, domain):
  """Returns the plain text of a piece of one domain."""
  alphabet = cipher.encipher(ALPHABET, domain)
  plain_letters = {alphabet[i]: ALPHABET[i] for i in range(len(ALPHABET))}
  return ''.join(plain_letters.get(letter, letter) for letter in text)


def test_a_text_in_two_alphabets():
  # The text has three pieces, of which the second is empty; two domains
  # alternate.
  plain = ['aba\n', '', 'aba\n', 'cba\n']
  first, second, third = cipher.documents(plain, 2, marked=True)
  assert first == '0bPb\n'
  assert second == '16$6\n'
  assert third == '0,Pb\n'
  for piece, text in ((first, 'aba\n'), (second, 'aba\n'), (third, 'cba\n')):
    assert decipher(piece[1:], MARKS.index(piece[0])) == text
  # Without marks, documents are equal but for them.
  unmarked = list(cipher.documents(plain, 2, marked=False))
  assert unmarked == [first[1:], second[1:], third[1:]]


def test_long_texts_are_cut_and_what_is_not_printable_is_left_out():
  text = 'né\tw\r\n' + 'x' * PIECE + '~'
  first, last = cipher.pieces(text)
  assert first == 'nw\n' + 'x' * (PIECE - 3)
  assert last == 'xxx~'
  assert list(cipher.pieces('é')) == list(cipher.pieces('')) == []


def test_alphabets_are_the_same_on_every_machine():
  # If this output changes, FORMAT must change too, since cached tokens depend
  # on it.
  assert cipher.FORMAT == 1
  assert cipher.encipher('def f(x):', 0) == '#%<]<W"B|'
  alphabets = {cipher.encipher(ALPHABET, d) for d in range(len(MARKS))}
  assert len(alphabets) == len(MARKS) < len(ALPHABET)
  assert {''.join(sorted(alphabet)) for alphabet in alphabets} == {ALPHABET}


@pytest.fixture(scope='module')
def source():
  return CipherSource(5, modules=PART).texts()


def test_the_whole_text_is_there_in_its_own_split(source):
  plain = PythonStdlibSource(PART).texts()
  plain_texts = {}
  for split in ('train', 'validation'):
    pieces = texts(CipherSource(5, True, PART).texts(), split)
    plain_texts[split] = [decipher(p[1:], MARKS.index(p[0])) for p in pieces]
    plain_text = ''.join(c for t in texts(plain, split) for c in t)
    plain_text = ''.join(c for c in plain_text if c in f'{ALPHABET}\n')
    assert ''.join(plain_texts[split]) == plain_text
    assert texts(source, split) == [piece[1:] for piece in pieces]
    assert max(map(len, plain_texts[split])) == PIECE
  full = {
    s: {p for p in plain_texts[s] if len(p) == PIECE} for s in plain_texts
  }
  assert full['validation'] and not full['validation'] & full['train']


def test_the_text_that_is_learned_can_be_cut(source):
  cut = CipherSource(5, modules=PART, train_bytes=PIECE + 10).texts()
  # Email and json begin with printable text alone.
  first, second, *_ = texts(source, 'train')
  assert texts(cut, 'train') == [first, second[:10]]
  assert texts(cut, 'validation') == texts(source, 'validation')
  assert cut.identity != source.identity


def test_identity_and_name(source):
  option_sets = [(5, False, PART), (6, False, PART), (5, True, PART)]
  option_sets += [(5, False, 'email'), (5, False, 'json,email')]
  sources = [CipherSource(*options).texts() for options in option_sets]
  # The last source lists the modules of the first in another order.
  assert len({s.identity for s in sources}) == 4
  assert sources[0].identity == sources[4].identity == source.identity


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
