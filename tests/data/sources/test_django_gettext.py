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
      size, begin = len(entry[column]), offset + len(texts)
      tables[column] += struct.pack(f'{order}2I', size, begin)
      texts += entry[column] + b'\0'
  head = struct.pack(f'{order}7I', 0x950412DE, 0, n, 28, 28 + 8 * n, 0, offset)
  return head + tables[0] + tables[1] + texts


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


def test_one_translation_a_message_of_all_languages_or_those_named(tmp_path):
  for app, language, entries in (
    ('admin', 'de', GERMAN),
    ('core', 'de', {'May': 'Kann', 'Save': 'Speichern', 'Blank': ' '}),
    ('core', 'fr', {'Save': 'Enregistrer'}),
  ):
    folder = tmp_path / app / 'locale' / language / 'LC_MESSAGES'
    folder.mkdir(parents=True)
    (folder / 'django.mo').write_bytes(catalogue(HEADER | entries))
  # The first of two translations without context is taken; one without
  # context is preferred; messages with an empty translation are left out.
  german = {
    Pair('de', 'Save', 'Sichern'),
    Pair('de', 'May', 'Kann'),
    Pair('de', '%d day', '%d Tag'),
  }
  french = Pair('fr', 'Save', 'Enregistrer')
  assert {*django_gettext.pairs(['de'], tmp_path)} == german
  assert django_gettext.pairs(['fr'], tmp_path) == [french]
  assert {*django_gettext.pairs([], tmp_path)} == {french, *german}
  assert french.inputs == 'fr: Save'
  with pytest.raises(ValueError, match=r"'dr'.*have \['de', 'fr'\]"):
    django_gettext.pairs(['dr'], tmp_path)


def test_djangos_own():
  pairs = django_gettext.pairs([], django_gettext.locate())
  languages = collections.Counter(pair.language for pair in pairs)
  assert len(languages) > 90 and len(pairs) > 50_000
  assert 700 < languages['de'] < 1000
  splits = collections.Counter(split_of(pair.message) for pair in pairs)
  assert 0.03 < splits['validation'] / len(pairs) < 0.08
  # Neighbouring rows differ in language, as the order is shuffled.
  repeats = sum(a.language == b.language for a, b in itertools.pairwise(pairs))
  assert repeats / len(pairs) < 0.05
  # A message is in one split in all languages, and judged by chrF.
  source = django_gettext.GettextSource('de,fr')
  messages = [{i[4:] for i, _ in source.pairs().pairs(split)}
              for split in ('train', 'validation')]  # fmt: skip
  assert 'Password' in set.union(*messages) and not set.intersection(*messages)
  assert {question.metric for question in source.questions()} == {'chrf'}


def test_without_django_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'django', None)
  with pytest.raises(ValueError, match=r'not installed: .*\[experiments\]'):
    django_gettext.locate()
