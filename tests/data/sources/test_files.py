"""Text files as documents of two splits, here and at a URL.

Told examples say where a file is cut and which files are held out.
"""

import gzip
import hashlib
import json

import pytest
from upath import UPath

from moe_jax.data import SPLITS, FilesSource, cache_folders


def splits_of(pattern):
  corpus = FilesSource(str(pattern)).texts()
  return [list(corpus.texts(split)) for split in SPLITS]


def make_files(folder, count):
  for i in range(count):
    path = folder / f'd{i % 3}' / f'{i}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{i:03}')


def test_one_file_is_cut_by_characters_and_keeps_its_line_ends(tmp_path):
  # The text has 15 characters of two bytes each; 90 % are 13, rounded down.
  (tmp_path / 'a.txt').write_text('é' * 13 + 'ßü', encoding='utf-8')
  assert splits_of(f'{tmp_path}/*.txt') == [['é' * 13], ['ßü']]
  (tmp_path / 'a.txt').write_bytes(b'a\r\n' * 10)
  assert splits_of(f'{tmp_path}/a.txt') == [['a\r\n' * 9], ['a\r\n']]


def test_many_files_are_split_by_name(tmp_path):
  make_files(tmp_path / 'here', 200)
  train, validation = splits_of(tmp_path / 'here/**/*.txt')
  assert sorted(train + validation) == [f'{i:03}' for i in range(200)]
  assert 8 <= len(validation) <= 32
  # Moving the folder changes no split, and a new file moves no old one.
  (tmp_path / 'here').rename(tmp_path / 'there')
  assert splits_of(tmp_path / 'there/**/*.txt') == [train, validation]
  (tmp_path / 'there' / 'new.txt').write_text('new')
  more_train, more_validation = splits_of(tmp_path / 'there/**/*.txt')
  assert set(train) <= set(more_train)
  assert set(validation) <= set(more_validation)


def test_few_files_give_each_split_one(tmp_path):
  make_files(tmp_path / 'two', 2)
  assert [*map(len, splits_of(tmp_path / 'two/*/*.txt'))] == [1, 1]
  # The first byte of each name's hash puts the file into validation.
  all_names = (f'{i}.txt' for i in range(90))
  names = [n for n in all_names if hashlib.sha256(n.encode()).digest()[0] < 25]
  for name in names:
    (tmp_path / name).write_text(name)
  train, validation = splits_of(tmp_path / '*.txt')
  assert len(train) == 1 and len(validation) == len(names) - 1 > 1


def test_a_file_that_a_pattern_fits_in_two_ways_is_read_once(
  tmp_path, monkeypatch
):
  for folder, text in (('src/src', 'ab'), ('src/other', 'cd')):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / 'x.txt').write_text(text)
  # '**' may end before either 'src' of 'src/src'; '~' is the home.
  monkeypatch.setenv('HOME', str(tmp_path))
  train, validation = splits_of('~/**/src/**/*.txt')
  assert sorted(train + validation) == ['ab', 'cd']


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=rf"matches 'no/\*' in {tmp_path}"):
    splits_of('no/*')
  with pytest.raises(ValueError, match=r'nobody://x/\*\.txt cannot be read'):
    splits_of('nobody://x/*.txt')


def test_a_file_that_changes_while_others_are_read_is_noticed(
  tmp_path, monkeypatch
):
  make_files(tmp_path, 3)
  sha256s = cache_folders.sha256s

  def change_after_digests(paths, memory):
    digests_by_path = sha256s(paths, memory)
    paths[0].write_text('changed')
    return digests_by_path

  monkeypatch.setattr(cache_folders, 'sha256s', change_after_digests)
  with pytest.raises(ValueError, match=r'0\.txt was changed while'):
    splits_of(tmp_path / '*/*')


def test_files_at_a_url_are_those_of_a_folder(tmp_path):
  url = UPath(f'memory://{tmp_path.name}')
  url.mkdir()
  lines = '\n'.join(json.dumps({'text': f'{i} ' * i}) for i in range(99))
  for name, content in (
    ('a.jsonl.gz', gzip.compress(lines.encode())),
    ('b.jsonl', lines.encode()),
    ('c.txt', b'to be or not to be'),
  ):
    (tmp_path / name).write_bytes(content)
    (url / name).write_bytes(content)
  for pattern in ('*', '*.jsonl', 'c.txt'):
    assert splits_of(f'{url}/{pattern}') == splits_of(f'{tmp_path}/{pattern}')
  corpus = FilesSource(f'{url}/*').texts()
  (url / 'b.jsonl').write_bytes(b'{"text": "other"}')
  assert FilesSource(f'{url}/*').texts().identity != corpus.identity
  with pytest.raises(ValueError, match=r'b\.jsonl was changed while it was'):
    list(corpus.texts('train'))
