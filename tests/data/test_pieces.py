"""Pieces of documents become one folder, whoever makes them and how often."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal

import numpy as np
import pytest
from upath import UPath

from moe_jax import data
from moe_jax.data import cache_folders, pieces, store, tokenizers
from moe_jax.data.contracts import DOCUMENTS, Pieces
from moe_jax.data.pieces import Engine, make
from moe_jax.data.sources import files


@pytest.fixture
def small_pieces(tmp_path, monkeypatch):
  """A function from a cache's name to options, for lines in six pieces."""
  monkeypatch.setattr(files, 'PIECE_BYTES', 2**12)
  for name in 'ab':
    lines = [json.dumps({'text': f'{name}{i} ' * (i % 37)}) for i in range(120)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))

  def options(cache):
    return data.DataOptions(
      source=data.FilesSource(f'{tmp_path}/*.jsonl'),
      seq_len=16,
      cache_dir=str(tmp_path / cache),
    )

  return options


def made(options, engine=Engine()):
  """Makes the tokens; returns their folder."""
  corpus = options.source.texts(options.selection)
  return make(corpus, options.tokenizer, options.selection, engine)


def digests_of(folder):
  """Returns the sha256 of every file of a folder, by name."""
  return {
    path.relative_to(folder): cache_folders.sha256(path)
    for path in folder.rglob('*')
    if path.is_file()
  }


def folder_in(cache):
  """Returns the only folder of tokens in a cache, which is alone there."""
  (folder,) = (pathlib.Path(cache) / 'tokens').iterdir()
  return folder


def test_progress_and_rows_are_those_of_one_piece(small_pieces, monkeypatch):
  options, progress = small_pieces('many'), []
  folder = made(options, Engine(on_progress=lambda *d: progress.append(d)))
  assert progress[0][1] == 0 and progress[-1][1] == progress[-1][2]
  assert len(options.source.texts().pieces.sizes) >= 6
  many = data.load(options)  # finds the folder, which is alone
  assert folder == folder_in(options.cache_dir)
  monkeypatch.setattr(files, 'PIECE_BYTES', 2**30)
  whole = data.load(small_pieces('one'))
  assert many.counts == whole.counts
  for split in data.SPLITS:
    piece_rows, whole_rows = many.splits[split], whole.splits[split]
    rows = np.arange(len(whole_rows) + 1)
    for name, values in piece_rows.take(rows).items():
      np.testing.assert_array_equal(values, whole_rows.take(rows)[name])


def test_a_folder_at_a_url_is_written_and_read(
  small_pieces, tmp_path, monkeypatch
):
  url = f'memory://{tmp_path.name}/cache'
  dataset = data.load(small_pieces('here'))
  here = folder_in(small_pieces('here').cache_dir)
  options = dataclasses.replace(small_pieces(''), cache_dir=url)
  for cache in ('a', 'b'):
    monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / cache))
    if cache == 'a':  # what is here already is written to the URL nevertheless
      data.load(dataclasses.replace(options, cache_dir=''))
    else:  # all pieces are copied, and none is made
      monkeypatch.setattr(store, 'write_piece', None)
    loaded = data.load(options)
    assert (loaded.digest, loaded.counts) == (dataset.digest, dataset.counts)
    (copy,) = (tmp_path / cache / 'urls').iterdir()
    assert digests_of(folder_in(copy)) == digests_of(here)
  (piece,) = UPath(url).glob('tokens/*/00001/train.documents.tokens')
  piece.write_bytes(piece.read_bytes()[::-1])
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / 'c'))
  with pytest.raises(ValueError, match=r'00001 is damaged.*has changed'):
    data.load(options)


def test_what_was_finished_is_kept_and_what_is_damaged_is_not(
  small_pieces, monkeypatch
):
  options = small_pieces('cache')

  def stop(tokenizer, texts):
    if any(text.startswith('b30 ') for text in texts):
      raise ValueError('stopped')
    return encode(tokenizer, texts)

  encode = tokenizers.Bytes.encode_batch
  with monkeypatch.context() as stopping:
    stopping.setattr(tokenizers.Bytes, 'encode_batch', stop)
    with pytest.raises(ValueError, match='stopped'):
      made(options)
  folder = folder_in(options.cache_dir)
  assert folder.suffix == '.parts'
  finished = sorted(path.name for path in folder.glob('0*'))
  assert finished == [f'{i:05}' for i in range(len(finished))]
  assert 3 <= len(finished) < 6
  name = 'train.documents.tokens'
  damaged_file = folder / '00001' / name
  damaged_file.write_bytes(damaged_file.read_bytes()[::-1])
  (folder / '00002' / 'files.json').write_text('{')
  (folder / '.00003-1').mkdir()  # a process was killed
  sizes, progress = options.source.texts().pieces.sizes, []
  again = made(options, Engine(on_progress=lambda *all: progress.append(all)))
  whole = [0, *range(3, len(finished))]  # the others were damaged
  assert progress[0][1] == sum(sizes[number] for number in whole)
  assert digests_of(again) == digests_of(made(small_pieces('fresh')))


def test_the_folder_that_another_process_made_meanwhile_is_taken(
  small_pieces, monkeypatch
):
  options, join = small_pieces('cache'), store.join

  def finish_other_first(*args):
    # As where the file system has no locks.
    unlocked = contextlib.nullcontext(False)
    monkeypatch.setattr(cache_folders, 'locked', lambda path: unlocked)
    monkeypatch.setattr(store, 'join', join)
    made(options)
    return join(*args)

  monkeypatch.setattr(store, 'join', finish_other_first)
  assert made(options) == folder_in(options.cache_dir)
  assert len(data.load(options).splits['train'])


def test_the_tokens_of_a_run_are_found_with_its_tokenizer(
  small_pieces, tmp_path
):
  options = dataclasses.replace(
    small_pieces('cache'), tokenizer=data.CharsOptions()
  )
  dataset = data.load(options)
  folder = folder_in(options.cache_dir)
  fitted = options.with_tokenizer(dataset.tokenizer)
  assert data.load(fitted).digest == dataset.digest
  assert folder_in(options.cache_dir) == folder
  # Other texts have other characters, and keep the tokenizer of the run.
  (tmp_path / 'b.jsonl').write_text('{"text": "b0 b1"}\n' * 99)
  changed = data.load(fitted)
  assert changed.tokenizer.identity == dataset.tokenizer.identity
  assert changed.digest != dataset.digest


class Broken(Pieces):
  """Pieces of which a library cannot read one, and kills its process."""

  sizes = (10, 20, 30)

  def __init__(self):
    super().__init__(list)

  def read(self, number):
    if number == 1:
      raise RuntimeError('row 3 is broken')
    if number == 2:
      os.kill(os.getpid(), signal.SIGKILL)
    return ((split, ('1 2',)) for split in data.SPLITS)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'error', 'message'),
  [
    (1, RuntimeError, 'row 3 is broken'),
    (2, ValueError, 'was killed .* lack of memory'),
  ],
)
def test_workers_tell_errors_of_any_kind(number, error, message, tmp_path):
  work = pieces.Work(tmp_path, Broken(), DOCUMENTS, tokenizers.Bytes())
  with pytest.raises(error, match=message):
    list(pieces.run_pool(work, [0, number], Engine(processes=2)))
