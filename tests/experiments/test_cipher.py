"""The CIPHER-K source: pieces of a text, each in its domain's alphabet."""

import pytest

from experiments.study import cipher
from experiments.study.cipher import ALPHABET, MARKS, PIECE, CipherSource
from moe_jax.data import PythonStdlibSource

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


def test_identity_and_name(source):
  option_sets = [(5, False, PART), (6, False, PART), (5, True, PART)]
  option_sets += [(5, False, 'email'), (5, False, 'json,email')]
  sources = [CipherSource(*options).texts() for options in option_sets]
  # The last source lists the modules of the first in another order.
  assert len({s.identity for s in sources}) == 4
  assert sources[0].identity == sources[4].identity == source.identity
