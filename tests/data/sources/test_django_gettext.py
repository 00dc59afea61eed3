"""Catalogues of translations, written by the test and django's own."""

import collections
import itertools
import struct
import sys

import pytest

from moe_jax.data.sources import django_gettext
from moe_jax.data.sources.django_gettext import Pair, read_catalogue
from moe_jax.data.sources.python_stdlib import split_of


def catalogue(entries, order='<'):
  """Returns the bytes of a compiled catalogue, as the gettext manual says."""
  entries = sorted((k.encode(), v.encode()) for k, v in entries.items())
  n = len(entries)
  offset = 28 + 16 * n
  tables, texts = [b'', b''], b''
  for column in (0, 1):
    for entry in entries:
      text = entry[column]
      tables[column] += struct.pack(
        f'{order}2I', len(text), offset + len(texts)
      )
      texts += text + b'\0'
  header = struct.pack(
    f'{order}7I', 0x950412DE, 0, n, 28, 28 + 8 * n, 0, offset
  )
  return header + tables[0] + tables[1] + texts


HEADER = {'': 'Content-Type: text/plain; charset=UTF-8\n'
              'Plural-Forms: nplurals=2; plural=(n != 1);\n'}  # fmt: skip
GERMAN = {
  'Save': 'Sichern',
  'month\x04May': 'Mai',
  'verb\x04May': 'Dürfen',
  '%d day\0%d days': '%d Tag\0%d Tage',
}


@pytest.mark.parametrize('order', ['<', '>'])
def test_a_catalogue_by_hand(order):
  assert dict(read_catalogue(catalogue(HEADER | GERMAN, order))) == {
    'Save': 'Sichern',
    'month\x04May': 'Mai',
    'verb\x04May': 'Dürfen',
    '%d day': '%d Tag',  # the singular's translation
  }


@pytest.fixture
def package(tmp_path):
  def write(app, language, entries):
    folder = tmp_path / app / 'locale' / language / 'LC_MESSAGES'
    folder.mkdir(parents=True)
    (folder / 'django.mo').write_bytes(catalogue(HEADER | entries))

  write('admin', 'de', GERMAN)
  write('core', 'de', {'May': 'Kann', 'Save': 'Speichern', 'Blank': ' '})
  write('core', 'fr', {'Save': 'Enregistrer'})
  return tmp_path


def test_one_translation_a_message(package):
  pairs = django_gettext.pairs(['de'], package)
  # The first of two translations without context is taken; one without
  # context is preferred; messages with an empty translation are left out.
  assert {(p.message, p.translation) for p in pairs} == {
    ('Save', 'Sichern'),
    ('May', 'Kann'),
    ('%d day', '%d Tag'),
  }
  assert Pair('de', 'Save', 'Sichern').inputs == 'de: Save'


def test_all_languages_or_those_named(package):
  all_pairs = django_gettext.pairs([], package)
  assert {pair.language for pair in all_pairs} == {'de', 'fr'}
  french = django_gettext.pairs(['fr'], package)
  assert french == [Pair('fr', 'Save', 'Enregistrer')]
  assert django_gettext.pairs(['de', 'fr'], package) == all_pairs
  with pytest.raises(ValueError, match=r"'dr'.*have \['de', 'fr'\]"):
    django_gettext.pairs(['dr'], package)


def test_djangos_own():
  pairs = django_gettext.pairs([], django_gettext.locate())
  languages = collections.Counter(pair.language for pair in pairs)
  assert len(languages) > 90 and len(pairs) > 50_000
  assert 700 < languages['de'] < 1000
  # No message is in both splits, whatever the language.
  messages = collections.defaultdict(set)
  splits = collections.Counter()
  for pair in pairs:
    messages[split_of(pair.message)].add(pair.message)
    splits[split_of(pair.message)] += 1
  assert not messages['train'] & messages['validation']
  assert 0.03 < splits['validation'] / len(pairs) < 0.08
  # Neighbouring rows differ in language, as the order is shuffled.
  repeats = sum(a.language == b.language for a, b in itertools.pairwise(pairs))
  assert repeats / len(pairs) < 0.05


def test_without_django_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'django', None)
  with pytest.raises(ValueError, match=r'not installed: .*\[experiments\]'):
    django_gettext.locate()


def test_translations_are_judged_by_chrf():
  source = django_gettext.GettextSource(languages='de')
  assert {question.metric for question in source.questions()} == {'chrf'}
