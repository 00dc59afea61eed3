"""The embedded corpus, files and TFDS datasets as two splits of documents."""

import hashlib
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.data import (
  FilesSource,
  PythonStdlibSource,
  Selection,
  TfdsSource,
)
from moe_jax.data.sources import python_stdlib

TWICE = Selection(('train', 'train'))


def texts(source, split):
  return list(source.documents(split))


# The embedded corpus.


def test_the_default_list_gives_8_megabytes():
  files = dict(python_stdlib.source_files())
  total = sum(len(text.encode()) for text in files.values())
  held_out = [n for n in files if python_stdlib.split_of(n) == 'validation']
  assert total >= 8_000_000
  assert 0.02 < len(held_out) / len(files) < 0.1
  folders = {part for name in files for part in name.split('/')[:-1]}
  assert not folders & {'test', 'tests', 'site-packages'}


@pytest.fixture
def fake_stdlib(tmp_path):
  root = tmp_path / 'stdlib'
  for name in ('json/a.py', 'json/test/b.py', 'json/c.txt', 'csv.py', 'os.py'):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'# {name} é', encoding='utf-8')
  (root / 'json' / 'latin.py').write_bytes(b'# \xe9')
  return root


def test_listed_modules_alone_without_tests_and_what_is_not_utf8(fake_stdlib):
  files = dict(python_stdlib.source_files(['json', 'csv', 'wave'], fake_stdlib))
  assert list(files) == ['csv.py', 'json/a.py']
  assert files['json/a.py'] == '# json/a.py é'


def test_the_builder_splits_by_name(fake_stdlib, tmp_path):
  for i in range(40):
    (fake_stdlib / 'json' / f'm{i}.py').write_text(str(i))
  builder = python_stdlib.PythonStdlib(
    modules=['json'],
    root=fake_stdlib,
    data_dir=tmp_path / 'tfds',
    file_format='array_record',
  )
  builder.download_and_prepare()
  names = {
    split: [e['name'].decode() for e in builder.as_data_source(split)]
    for split in ('train', 'validation')
  }
  expected = [
    name for name, _ in python_stdlib.source_files(['json'], fake_stdlib)
  ]
  assert sorted(names['train'] + names['validation']) == expected
  assert names['validation']
  for split, own in names.items():
    assert {python_stdlib.split_of(name) for name in own} == {split}


def test_the_digest_follows_names_and_text(fake_stdlib):
  def digest():
    files = python_stdlib.source_files(['json'], fake_stdlib)
    return python_stdlib.content_digest(files)

  seen = {digest()}
  (fake_stdlib / 'json' / 'a.py').write_text('changed')
  seen.add(digest())
  (fake_stdlib / 'json' / 'a.py').rename(fake_stdlib / 'json' / 'b.py')
  seen.add(digest())
  assert len(seen) == 3
  (fake_stdlib / 'os.py').write_text('another module')
  assert digest() in seen


def test_a_part_of_the_standard_library():
  source = PythonStdlibSource('email,json').texts()
  files = dict(python_stdlib.source_files(['json', 'email']))
  for split in ('train', 'validation'):
    expected = [
      t for n, t in files.items() if python_stdlib.split_of(n) == split
    ]
    # An empty file of a package is a document too, though one without tokens.
    assert sorted(texts(source, split)) == sorted(expected)
  assert 'tensorflow' not in sys.modules


def test_too_few_modules_for_two_splits_are_refused():
  with pytest.raises(ValueError, match=r"python_stdlib:keyword .*\['valid"):
    PythonStdlibSource('keyword').texts()


def test_a_module_not_listed_is_refused():
  with pytest.raises(ValueError, match="'jsn'; did you mean 'json'"):
    PythonStdlibSource('jsn').texts()


# Files.


def test_one_file_is_cut_by_characters(tmp_path):
  # 15 characters of two bytes: 13 are 90 %, rounded down.
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
  # Moving the folder changes nothing; a new file moves no old one.
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
  # The first byte of each name's hash is low enough for validation.
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


# TFDS datasets.


class Poems(tfds.core.GeneratorBasedBuilder):
  """Twenty poems in 'train' and none elsewhere."""

  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    features = {
      'line': tfds.features.Text(),
      'raw': tfds.features.Tensor(shape=(), dtype=np.object_),
      'stars': tfds.features.Tensor(shape=(), dtype=np.int32),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(20):
      yield i, {'line': f'poém {i}', 'raw': b'\xe9', 'stars': i}


@pytest.fixture(scope='module')
def poems_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  builder = Poems(data_dir=folder, file_format='array_record')
  builder.download_and_prepare()
  return folder


@pytest.fixture
def poems(poems_folder, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(poems_folder))

  def open_poems(train='train[:75%]', validation='train[75%:]', text='line'):
    source = TfdsSource('poems', text_feature=text)
    return source.texts(Selection((train, validation)))

  return open_poems


def test_a_prepared_dataset_in_parts(poems):
  source = poems()
  train, validation = texts(source, 'train'), texts(source, 'validation')
  assert (len(train), len(validation)) == (15, 5)
  assert sorted(train + validation) == sorted(f'poém {i}' for i in range(20))
  assert '1.2.0' in source.name
  assert 'tensorflow' not in sys.modules


def test_what_is_selected_changes_the_identity(poems):
  sources = [poems(), poems('train[:50%]'), poems(text='raw'), poems()]
  identities = [source.identity for source in sources]
  assert len(set(identities)) == 3
  assert identities[0] == identities[3]


def test_an_unknown_feature_names_those_that_exist(poems):
  with pytest.raises(ValueError, match=r"'lin'; did you mean 'line'.*'stars'"):
    poems(text='lin')


@pytest.mark.parametrize('split', ['test', 'train[5', 'train[:10%]+test'])
def test_an_unknown_split_names_those_that_exist(poems, split):
  with pytest.raises(ValueError, match=r"unknown split .*have \['train'\]"):
    poems(validation=split)


@pytest.mark.parametrize(
  ('feature', 'message'),
  [('stars', "'stars' 0 of 'poems' has type int"), ('raw', 'is not UTF-8')],
)
def test_a_feature_that_is_no_text(poems, feature, message):
  with pytest.raises(ValueError, match=message):
    texts(poems(text=feature), 'train')


def test_an_unknown_dataset_names_those_prepared(poems):
  with pytest.raises(ValueError, match=r"'poemz' .*\['poems'\]"):
    TfdsSource('poemz').texts()


def test_a_dataset_that_needs_a_manual_download(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(ValueError, match=r"(?s)'samsum' could not .*TensorFlow"):
    TfdsSource('samsum').texts()


def test_what_is_prepared_is_locked_even_in_a_new_folder(tmp_path, monkeypatch):
  folder, locks = tmp_path / 'new' / 'tfds', []
  generate = Poems._generate_examples

  def watched(*args):
    locks.append((folder / '.poems.lock').exists())
    return generate(*args)

  monkeypatch.setattr(Poems, '_generate_examples', watched)
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
  TfdsSource('poems', text_feature='line').texts(TWICE)
  assert locks == [True]


def test_a_dataset_in_another_format(tmp_path, monkeypatch, poems_folder):
  # As a machine with TensorFlow leaves it by default.
  own = tmp_path / 'poems' / '1.2.0'
  own.mkdir(parents=True)
  for path in (poems_folder / 'poems' / '1.2.0').iterdir():
    name = path.name.replace('array_record', 'tfrecord')
    content = path.read_bytes()
    if path.suffix == '.json':
      content = content.replace(b'array_record', b'tfrecord')
    (own / name).write_bytes(content)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(ValueError, match=r"'poems'.*array_record"):
    TfdsSource('poems', text_feature='line').texts(TWICE)


def test_modules_that_distributions_leave_out_are_only_had_by_name():
  assert not set(python_stdlib.MODULES) & set(python_stdlib.OPTIONAL_MODULES)
  names = [name for name, _ in python_stdlib.source_files(['encodings'])]
  assert 'encodings/ascii.py' in names
  everything = [name for name, _ in python_stdlib.source_files()]
  assert not set(names) & set(everything)
