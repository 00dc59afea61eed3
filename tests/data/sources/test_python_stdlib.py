"""The embedded corpus as documents of two splits."""

import sys

import pytest
import tensorflow_datasets as tfds

from moe_jax.data import PythonStdlibSource, Selection
from moe_jax.data.sources import python_stdlib


def texts(source, split):
  return list(source.texts(split))


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


def test_the_digest_follows_names_and_text(fake_stdlib):
  def digest():
    files = python_stdlib.source_files(['json'], fake_stdlib)
    return python_stdlib.content_digest(files)

  digests = {digest()}
  (fake_stdlib / 'json' / 'a.py').write_text('changed')
  digests.add(digest())
  (fake_stdlib / 'json' / 'a.py').rename(fake_stdlib / 'json' / 'b.py')
  digests.add(digest())
  assert len(digests) == 3
  (fake_stdlib / 'os.py').write_text('another module')
  assert digest() in digests


def test_a_part_of_the_standard_library():
  source = PythonStdlibSource('email,json').texts()
  files = dict(python_stdlib.source_files(['json', 'email']))
  for split in ('train', 'validation'):
    expected = [
      t for n, t in files.items() if python_stdlib.split_of(n) == split
    ]
    # An empty file of a package is a document without tokens.
    assert sorted(texts(source, split)) == sorted(expected)
  assert 'tensorflow' not in sys.modules


class Library(tfds.core.GeneratorBasedBuilder):
  """A dataset of the files of two packages."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
    )

  def _split_generators(self, dl_manager):
    splits = ('train', 'validation')
    return {split: self._generate_examples(split) for split in splits}

  def _generate_examples(self, split):
    for name, text in python_stdlib.source_files(['email', 'json']):
      if python_stdlib.split_of(name) == split:
        yield name, {'text': text}


def test_the_order_and_the_parts_are_those_of_tfds(tmp_path):
  builder = Library(data_dir=tmp_path, file_format='array_record')
  builder.download_and_prepare()
  for splits in [
    ('train', 'validation'),
    ('train[:90%]', 'train[90%:]+validation'),
    ('train[3:7]', 'all'),
  ]:
    source = PythonStdlibSource('email,json').texts(Selection(splits))
    for name, split in zip(splits, ('train', 'validation')):
      expected = [e['text'].decode() for e in builder.as_data_source(name)]
      assert texts(source, split) == expected


@pytest.mark.parametrize('split', ['test', 'train[5'])
def test_an_unknown_split_names_those_that_exist(split):
  source = PythonStdlibSource('email,json').texts(Selection(('train', split)))
  with pytest.raises(ValueError, match=r"unknown split .*have \['train', 'val"):
    texts(source, 'validation')


def test_only_the_first_bytes_are_trained_on():
  whole = PythonStdlibSource('email,json').texts()
  part = PythonStdlibSource('email,json', train_bytes=70000).texts()
  part_text, whole_text = (''.join(texts(s, 'train')) for s in (part, whole))
  assert len(part_text.encode()) == 70000 and whole_text.startswith(part_text)
  assert texts(part, 'validation') == texts(whole, 'validation')
  assert part.identity != whole.identity


def test_a_cut_within_a_character_leaves_it_out():
  assert [*python_stdlib.first_bytes(['ab', 'cé', 'd'], 4)] == ['ab', 'c']
  assert [*python_stdlib.first_bytes(['ab', 'cé', 'd'], 5)] == ['ab', 'cé']
  assert [*python_stdlib.first_bytes(['ab', 'cé'], 0)] == ['ab', 'cé']


def test_too_few_modules_for_two_splits_are_refused():
  with pytest.raises(ValueError, match=r"python_stdlib:keyword .*\['valid"):
    PythonStdlibSource('keyword').texts()


def test_a_module_not_listed_is_refused():
  with pytest.raises(ValueError, match="'jsn'; did you mean 'json'"):
    PythonStdlibSource('jsn').texts()


def test_modules_that_distributions_leave_out_are_only_had_by_name():
  assert not set(python_stdlib.MODULES) & set(python_stdlib.OPTIONAL_MODULES)
  names = [name for name, _ in python_stdlib.source_files(['encodings'])]
  assert 'encodings/ascii.py' in names
  default_names = [name for name, _ in python_stdlib.source_files()]
  assert not set(names) & set(default_names)
