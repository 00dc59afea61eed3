"""Every source keeps its contract: ours, and a user's own.

A source is compared with itself: read again, in pieces, with its splits
swapped, and with other content.
"""

import json
import pickle
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from moe_jax.data import (
  SOURCES,
  SPLITS,
  DocstringsSource,
  FilesSource,
  GettextSource,
  InstructionSource,
  JsonlSource,
  PythonStdlibSource,
  Selection,
  SourceOptions,
  Texts,
  TfdsSource,
)
from moe_jax.data.sources import files
from moe_jax.errors import InputError
from moe_jax.evaluation.scores import METRICS
from tests.data.own_kinds import Counting


class Case(NamedTuple):
  """Functions that take a folder and return a source, and one that differs."""

  source: Callable[..., SourceOptions]
  other: Callable[..., SourceOptions]


def given(source, other):
  return Case(lambda folder: source, lambda folder: other)


def texts(folder, end=''):
  for name in 'ab':
    lines = [json.dumps({'text': f'{name}{i} ' * 9 + end}) for i in range(60)]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines))
  return FilesSource(f'{folder}/*.jsonl')


def pairs(folder, end=''):
  lines = [json.dumps({'inputs': f'{i}', 'targets': f't{i}{end}'})
           for i in range(99)]  # fmt: skip
  (folder / 'a.jsonl').write_text('\n'.join(lines))
  return JsonlSource(f'{folder}/*.jsonl')


OWN = 'tests.data.own_kinds:Counting'
CASES = {
  'python_stdlib': given(
    PythonStdlibSource('email,json'),
    PythonStdlibSource('email,json', train_bytes=7),
  ),
  'python_stdlib_docstrings': given(
    DocstringsSource('asyncio,email,json'), DocstringsSource('email,json')
  ),
  'django_gettext': given(GettextSource('de,fr'), GettextSource('de')),
  'instructions': given(
    InstructionSource('rot13', num_train=7, num_validation=3),
    InstructionSource('rot13', num_train=5, num_validation=3),
  ),
  'files': Case(texts, lambda folder: texts(folder, 'end')),
  'jsonl': Case(pairs, lambda folder: pairs(folder, 'end')),
  'tfds': given(
    TfdsSource('examples', 'line', 'line', 'summary'),
    TfdsSource('examples', 'summary', 'summary', 'line'),
  ),
  OWN: given(Counting(3), Counting(4)),
}
FORMS = [
  (kind, form)
  for kind in {**SOURCES.builtin, OWN: Counting}
  for form in SOURCES.get(kind).gives()
]
each = pytest.mark.parametrize(('kind', 'form'), FORMS)


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch, tfds_data):
  monkeypatch.setattr(files, 'PIECE_BYTES', 2**10)


def entries(corpus, split):
  if isinstance(corpus, Texts):
    return [(text,) for text in corpus.texts(split)]
  return list(corpus.pairs(split))


def content(corpus):
  return {split: entries(corpus, split) for split in SPLITS}


@each
def test_every_reading_and_all_pieces_give_the_same(kind, form, tmp_path):
  source = CASES[kind].source(tmp_path)
  corpus = getattr(source, form)()
  first = content(corpus)
  for split in SPLITS:
    assert any(map(all, first[split]))
    assert {type(t) for entry in first[split] for t in entry} == {str}
  assert content(corpus) == first == content(getattr(source, form)())
  pieces = corpus.in_pieces()
  if len(pieces.sizes) > 1:  # other processes read them
    pieces = pickle.loads(pickle.dumps(pieces))
  assert (len(pieces.sizes) > 1) == (kind == 'files')
  in_pieces = {split: [] for split in SPLITS}
  for number in range(len(pieces.sizes)):
    for split, entry in pieces.read(number):
      in_pieces[split].append(entry)
  assert in_pieces == first
  assert 'tensorflow' not in sys.modules


@each
def test_splits_are_taken_by_the_sources_own_names(kind, form, tmp_path):
  source = CASES[kind].source(tmp_path)
  corpus = getattr(source, form)()
  swapped = getattr(source, form)(Selection(('validation', 'train')))
  assert entries(swapped, 'train') == entries(corpus, 'validation')
  assert entries(swapped, 'validation') == entries(corpus, 'train')
  if kind in SOURCES.builtin:
    with pytest.raises(InputError, match=r"'test'.* have \['train', 'v"):
      entries(getattr(source, form)(Selection(('train', 'test'))), 'validation')


@each
def test_other_content_has_another_identity(kind, form, tmp_path):
  source = CASES[kind].source(tmp_path)
  corpus, again, swapped = (
    getattr(source, form)(Selection(splits))
    for splits in (SPLITS, SPLITS, SPLITS[::-1])
  )
  assert again.identity == corpus.identity
  was, changed = content(corpus), []
  if was['train'] != was['validation']:
    changed.append(swapped)
  if form == 'pairs':
    changed.append(corpus.with_prefix('say '))
    prefixed = [(f'say {i}', t) for i, t in was['train']]
    assert entries(changed[-1], 'train') == prefixed
  changed.append(getattr(CASES[kind].other(tmp_path), form)())
  assert content(changed[-1]) != was
  identities = {corpus.identity, *(c.identity for c in changed)}
  assert len(identities) == 1 + len(changed)


@pytest.mark.parametrize('kind', [k for k, form in FORMS if form == 'pairs'])
def test_questions_are_the_validation_pairs(kind, tmp_path):
  source = CASES[kind].source(tmp_path)
  pairs = source.pairs().pairs('validation')
  questions = source.questions()
  assert [q[:2] for q in questions] == [pair for pair in pairs if all(pair)]
  assert {question.metric for question in questions} <= {*METRICS}
