"""Text files as documents of two splits."""

import gzip
import hashlib
import json

import pytest
from upath import UPath

from moe_jax.data import SPLITS, FilesSource, Selection, cache_folders


def texts(source, split):
  return list(source.texts(split))


def test_one_file_is_cut_by_characters(tmp_path):
  # The text has 15 characters of two bytes each; 90 % are 13, rounded down.
  (tmp_path / 'a.txt').write_text('é' * 13 + 'ßü', encoding='utf-8')
  source = FilesSource(f'{tmp_path}/*.txt').texts()
  assert texts(source, 'train') == ['é' * 13]
  assert texts(source, 'validation') == ['ßü']


def test_line_ends_are_kept(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'a\r\n' * 10)
  assert texts(FilesSource(f'{tmp_path}/a.txt').texts(), 'train') == [
    'a\r\n' * 9
  ]


def make_files(folder, count):
  for i in range(count):
    path = folder / f'd{i % 3}' / f'{i}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{i:03}')


def split_sets(folder):
  source = FilesSource(f'{folder}/**/*.txt').texts()
  return tuple(texts(source, split) for split in ('train', 'validation'))


def test_many_files_are_split_by_name(tmp_path):
  make_files(tmp_path / 'here', 200)
  train, validation = split_sets(tmp_path / 'here')
  assert sorted(train + validation) == [f'{i:03}' for i in range(200)]
  assert 8 <= len(validation) <= 32
  # Moving the folder changes no split, and a new file moves no old one.
  (tmp_path / 'here').rename(tmp_path / 'there')
  assert split_sets(tmp_path / 'there') == (train, validation)
  (tmp_path / 'there' / 'new.txt').write_text('new')
  more_train, more_validation = split_sets(tmp_path / 'there')
  assert set(train) <= set(more_train)
  assert set(validation) <= set(more_validation)


@pytest.mark.parametrize('count', [2, 3, 5])
def test_few_files_give_each_split_one(count, tmp_path):
  make_files(tmp_path, count)
  train, validation = split_sets(tmp_path)
  assert train and validation and len(train + validation) == count


def test_not_every_file_is_held_out(tmp_path):
  # The first byte of each name's hash puts the file into validation.
  names = [
    name
    for name in (f'{i}.txt' for i in range(90))
    if hashlib.sha256(name.encode()).digest()[0] < 25
  ]
  assert len(names) > 2
  for name in names:
    (tmp_path / name).write_text(name)
  source = FilesSource(f'{tmp_path}/*.txt').texts()
  assert len(texts(source, 'train')) == 1


def test_files_change_the_identity(tmp_path):
  make_files(tmp_path, 4)

  def identity():
    return FilesSource(f'{tmp_path}/**/*.txt').texts().identity

  first = identity()
  assert identity() == first
  (tmp_path / 'd0' / '0.txt').write_text('changed')
  assert identity() != first


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  make_files(tmp_path, 2)
  assert texts(FilesSource('~/d0/0.txt').texts(), 'validation') == ['0']


def test_a_file_that_a_pattern_fits_in_two_ways_is_read_once(tmp_path):
  for folder, text in (('src/src', 'ab'), ('src/other', 'cd')):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / 'x.txt').write_text(text)
  # '**' may end before either 'src' of 'src/src'.
  source = FilesSource(f'{tmp_path}/**/src/**/*.txt').texts()
  both = texts(source, 'train') + texts(source, 'validation')
  assert sorted(both) == ['ab', 'cd'] and '(2 found)' in source.name


def test_missing_files_name_glob_and_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=rf"matches 'no/\*' in {tmp_path}"):
    FilesSource('no/*').texts()


def test_a_file_not_utf8_is_named(tmp_path):
  (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
  source = FilesSource(f'{tmp_path}/latin.txt').texts()
  with pytest.raises(ValueError, match=r'latin.txt is not UTF-8'):
    texts(source, 'train')


def test_files_have_two_splits(tmp_path):
  make_files(tmp_path, 2)
  with pytest.raises(ValueError, match="'test'; have"):
    FilesSource(f'{tmp_path}/*/*').texts(Selection(('train', 'test')))


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
  source = FilesSource(f'{tmp_path}/*/*').texts()
  with pytest.raises(ValueError, match=r'0\.txt was changed while'):
    [texts(source, split) for split in ('train', 'validation')]


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
    here = FilesSource(f'{tmp_path}/{pattern}').texts()
    there = FilesSource(f'{url}/{pattern}').texts()
    for split in SPLITS:
      assert texts(there, split) == texts(here, split)
  all_files = FilesSource(f'{url}/*').texts()
  (url / 'b.jsonl').write_bytes(b'{"text": "other"}')
  assert FilesSource(f'{url}/*').texts().identity != all_files.identity
  with pytest.raises(ValueError, match=r'b\.jsonl was changed while it was'):
    texts(all_files, 'train')


def test_a_url_that_nobody_reads_is_told():
  with pytest.raises(ValueError, match=r'nobody://x/\*\.txt cannot be read'):
    FilesSource('nobody://x/*.txt').texts()
