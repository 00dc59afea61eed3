"""The CIPHER-K source: pieces of a text, each in its domain's alphabet."""

import collections

import pytest

from experiments.study import cipher
from experiments.study.cipher import ALPHABET, MARKS, PIECE, CipherSource
from moe_jax.data import (
  DataOptions,
  PythonStdlibSource,
  eval_batches,
  load,
)

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


def test_every_domain_has_an_alphabet_of_its_own():
  alphabets = [cipher.encipher(ALPHABET, d) for d in range(len(MARKS))]
  assert len(set(alphabets)) == len(MARKS) < len(ALPHABET)
  assert {''.join(sorted(alphabet)) for alphabet in alphabets} == {ALPHABET}
  # A random permutation leaves one letter in its place on average.
  pairs = [pair for a in alphabets for pair in zip(a, ALPHABET, strict=True)]
  assert sum(a == b for a, b in pairs) < 2 * len(MARKS)


def test_alphabets_are_the_same_on_every_machine():
  # If this output changes, FORMAT must change too, since cached tokens depend
  # on it.
  assert cipher.FORMAT == 1
  assert cipher.encipher('def f(x):', 0) == '#%<]<W"B|'


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


def test_identity_and_name(source):
  option_sets = [(5, False, PART), (6, False, PART), (5, True, PART)]
  for modules in ('email', 'json,email'):
    option_sets.append((5, False, modules))
  sources = [CipherSource(*options).texts() for options in option_sets]
  # The last source lists the modules of the first in another order.
  assert len({s.identity for s in sources}) == 4
  assert sources[0].identity == sources[4].identity == source.identity
  assert source.name.startswith('synthetic: 5 ciphers of python_stdlib:email')
  assert texts(source, 'train') == texts(sources[0], 'train')


def test_most_rows_are_of_one_domain_and_even_neighbours_of_all():
  dataset = load(DataOptions(source=CipherSource(5, True, PART), seq_len=64))
  assert 'data: synthetic: 5 ciphers, marked, of python' in dataset.describe()
  assert dataset.vocab_size == 257
  batches = eval_batches(dataset.splits['validation'], batch_size=32)
  batch = next(batches)
  assert (batch['segment_ids'].max(1) == 1).mean() > 0.6
  # Every piece begins with a mark, but that of the row's start, which may be
  # the rest of a piece.
  is_start = (batch['positions'] == 0) & (batch['segment_ids'] > 1)
  marks = collections.Counter(map(chr, batch['tokens'][is_start].tolist()))
  assert set(marks) == set(MARKS[:5])


@pytest.mark.parametrize('number', [0, -1, 95])
def test_the_number_of_ciphers_has_bounds(number):
  message = rf'num_ciphers={number} not in \[1, 94\]'
  with pytest.raises(ValueError, match=message):
    CipherSource(number)
