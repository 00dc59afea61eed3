"""Pieces of documents become one folder, whoever makes them and how often."""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal

import numpy as np
import pytest

from moe_jax import data
from moe_jax.data import (
  piece_workers,
  tokenizers,
  tokens_folder,
)
from moe_jax.data.sources import files
from moe_jax.data.sources.contract import Located, Pieces
from moe_jax.data.tokens_folder import Share, make


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


def report_of_shares(options, *shares):
  """Makes the shares; returns the last one's report and all progress."""
  corpus = options.source.texts(options.selection)
  progress = []
  for share in shares:
    share = share._replace(on_progress=lambda *bytes_: progress.append(bytes_))
    report = make(corpus, options.tokenizer, options.selection, share)
  return report, progress


def digests_of(folder):
  """Returns the sha256 of every file of a folder, by name."""
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.iterdir()
  }


def folder_in(cache):
  """Returns the only folder of tokens in a cache, which is alone there."""
  (folder,) = (pathlib.Path(cache) / 'tokens').iterdir()
  return folder


def test_all_make_what_a_run_makes_by_itself(small_pieces):
  dataset = data.load(small_pieces('run'))
  folder = folder_in(small_pieces('run').cache_dir)
  options = small_pieces('theirs')
  shares = Share(host=1, num_hosts=2), Share(host=0, num_hosts=2)
  report, progress = report_of_shares(options, *shares)
  assert not report.missing and progress[-1][0] == progress[-1][1]
  assert report.folder == folder_in(options.cache_dir)
  assert report.folder.name == folder.name
  assert digests_of(report.folder) == digests_of(folder)
  # A run that finds the folder learns from the same rows.
  loaded = data.load(options)
  assert (loaded.digest, loaded.counts) == (dataset.digest, dataset.counts)
  assert len([p for p in folder.iterdir() if p.match('train.0*')]) >= 6


def test_rows_are_those_of_one_piece(small_pieces, monkeypatch):
  pieces = data.load(small_pieces('many'))
  monkeypatch.setattr(files, 'PIECE_BYTES', 2**30)
  whole = data.load(small_pieces('one'))
  assert pieces.counts == whole.counts
  for split in data.SPLITS:
    piece_rows, whole_rows = pieces.splits[split], whole.splits[split]
    assert len(piece_rows) == len(whole_rows)
    rows = np.random.default_rng(0).integers(0, len(piece_rows), 200)
    for name, values in piece_rows.take(rows).items():
      np.testing.assert_array_equal(values, whole_rows.take(rows)[name])


def test_what_was_finished_is_kept_and_what_is_damaged_is_not(
  small_pieces, monkeypatch
):
  options = small_pieces('cache')
  corpus = options.source.texts(options.selection)

  def stop(tokenizer, text):
    if text.startswith('b30 '):
      raise ValueError('stopped')
    return encode(tokenizer, text)

  encode = tokenizers.Bytes.encode
  with monkeypatch.context() as stopping:
    stopping.setattr(tokenizers.Bytes, 'encode', stop)
    with pytest.raises(ValueError, match='stopped'):
      make(corpus, options.tokenizer, options.selection, Share())
  folder = folder_in(options.cache_dir)
  assert folder.suffix == '.parts'
  finished = sorted(path.name for path in folder.iterdir() if path.is_dir())
  assert (
    finished == [f'{i:05}' for i in range(len(finished))]
    and 3 <= len(finished) < 6
  )
  written_ns = (folder / '00000' / 'train.tokens').stat().st_mtime_ns
  damaged_file = folder / '00001' / 'train.tokens'
  damaged_file.write_bytes(damaged_file.read_bytes()[::-1])
  (folder / '00002' / 'piece.json').write_text('{')
  (folder / 'unfinished-00003-1').mkdir()
  report = make(corpus, options.tokenizer, options.selection, Share())
  assert report.num_existing == len(finished) - 2
  kept_ns = (report.folder / 'train.00000.tokens').stat().st_mtime_ns
  assert kept_ns == written_ns
  fresh, _ = report_of_shares(small_pieces('fresh'), Share())
  assert digests_of(report.folder) == digests_of(fresh.folder)


def test_a_piece_that_another_process_has_just_finished_is_kept(
  small_pieces, monkeypatch
):
  options = small_pieces('cache')
  corpus = options.source.texts(options.selection)
  piece_facts, calls = tokens_folder.piece_facts, []

  def finish_meanwhile(work, number, **digests):
    facts = piece_facts(work, number, **digests)
    if not calls:  # the other process finishes the piece after this look
      calls.append(number)
      piece_workers.write_piece(work, number, lambda count: None)
      calls.append((work.path(number) / 'train.tokens').stat().st_mtime_ns)
    return facts

  monkeypatch.setattr(tokens_folder, 'piece_facts', finish_meanwhile)
  report = make(corpus, options.tokenizer, options.selection, Share())
  tokens_file = report.folder / 'train.00000.tokens'
  assert calls == [0, tokens_file.stat().st_mtime_ns]


def test_two_that_join_the_pieces_do_not_disturb_each_other(
  small_pieces, monkeypatch
):
  options = small_pieces('cache')
  corpus = options.source.texts(options.selection)
  link, targets = piece_workers.link, []

  def link_beside_another(source, target):
    targets.append(target)
    if len(targets) == 3:
      with pytest.raises(RuntimeError, match='killed'):
        make(corpus, options.tokenizer, options.selection, Share())
    elif len(targets) == 4:  # this is the other process
      raise RuntimeError('killed')
    link(source, target)

  monkeypatch.setattr(piece_workers, 'link', link_beside_another)
  report = make(corpus, options.tokenizer, options.selection, Share())
  assert len(targets) > 4
  fresh, _ = report_of_shares(small_pieces('fresh'), Share())
  assert digests_of(report.folder) == digests_of(fresh.folder)


@pytest.mark.parametrize('share', [Share(), Share(host=1, num_hosts=2)])
@pytest.mark.parametrize(
  'before', [(piece_workers, 'join'), (piece_workers, 'write_pieces')]
)
def test_the_folder_that_another_process_made_meanwhile_is_taken(
  before, share, small_pieces, monkeypatch
):
  options = small_pieces('cache')
  corpus = options.source.texts(options.selection)
  original = getattr(*before)

  def finish_other_first(*args):
    with monkeypatch.context() as patch:
      patch.setattr(*before, original)
      make(corpus, options.tokenizer, options.selection, Share())
    return original(*args)

  monkeypatch.setattr(*before, finish_other_first)
  report = make(corpus, options.tokenizer, options.selection, share)
  assert not report.missing and report.folder == folder_in(options.cache_dir)
  assert len(data.load(options).splits['train'])


def test_missing_pieces_of_other_hosts_are_counted(small_pieces, monkeypatch):
  options = small_pieces('cache')
  report, progress = report_of_shares(options, Share(host=0, num_hosts=3))
  assert report.missing and not report.folder.exists()
  sizes = options.source.texts(options.selection).pieces.sizes
  assert progress[-1] == (sum(sizes[::3]), sum(sizes[::3]))
  with monkeypatch.context() as patch:
    patch.setattr(tokens_folder, 'make', lambda *_: report)
    with pytest.raises(ValueError, match=r'removed the pieces \[1, 2'):
      data.load(options)
  # The next command, or a run, makes the rest and joins all.
  num_kept = report_of_shares(options, Share())[0].num_existing
  assert num_kept + len(report.missing) == len(sizes)


def test_a_file_that_changes_meanwhile_is_noticed(small_pieces, tmp_path):
  options = small_pieces('cache')
  corpus = options.source.texts(options.selection)
  with (tmp_path / 'b.jsonl').open('a') as file:
    file.write('\n')
  with pytest.raises(ValueError, match=r'b\.jsonl was changed while'):
    make(corpus, options.tokenizer, options.selection, Share())


@pytest.mark.parametrize(
  'options', [data.CharsOptions(), data.TrainedOptions(vocab_size=280)]
)
def test_the_tokens_of_a_run_are_found_with_its_tokenizer(
  options, small_pieces, tmp_path
):
  data_options = dataclasses.replace(small_pieces('cache'), tokenizer=options)
  dataset = data.load(data_options)
  folder = folder_in(data_options.cache_dir)
  fitted_options = data_options.with_tokenizer(dataset.tokenizer)
  assert data.load(fitted_options).digest == dataset.digest
  assert folder_in(data_options.cache_dir) == folder
  # Other texts have other characters, and keep the tokenizer of the run.
  (tmp_path / 'b.jsonl').write_text('{"text": "b0 b1"}\n' * 99)
  changed = data.load(fitted_options)
  assert changed.tokenizer.identity == dataset.tokenizer.identity
  assert changed.digest != dataset.digest


class Broken(Pieces):
  """Pieces of which a library cannot read one, and kills its process."""

  sizes = (10, 20, 30)

  def read(self, number):
    if number == 1:
      raise RuntimeError('row 3 is broken')
    if number == 2:
      os.kill(os.getpid(), signal.SIGKILL)
    return (Located(split, '1 2', 10) for split in data.SPLITS)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'error', 'message'),
  [
    (1, RuntimeError, 'row 3 is broken'),
    (2, ValueError, 'was killed .* lack of memory'),
  ],
)
def test_workers_tell_errors_of_any_kind(number, error, message, tmp_path):
  work = piece_workers.Work(tmp_path, Broken(), tokenizers.Bytes())
  with pytest.raises(error, match=message):
    piece_workers.write_pieces(work, [0, number], 2, lambda count: None)


def test_pairs_have_their_folder(small_pieces):
  options = small_pieces('cache')
  pairs = data.InstructionSource(num_train=16).pairs(options.selection)
  report = make(pairs, options.tokenizer, options.selection, Share(processes=2))
  assert (report.folder / 'train.inputs.tokens').exists()


def test_the_peak_of_memory_is_that_of_this_process():
  peak = piece_workers.peak_memory()
  assert peak == 0 or 2**25 < peak < 2**37
