"""Damages of a folder that the manifest detects, one at a time."""

import collections
import json

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from moe_jax.runs import manifest
from moe_jax.runs.manifest import BadCheckpoint, Manifest

TREE = {'w': 'float32[3]'}


@pytest.fixture
def folder(tmp_path):
  """A sealed folder of two files, one of them in a folder of its own."""
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd' / 'arrays').write_bytes(bytes(range(256)) * 4)
  (tmp_path / 'meta').write_text('{"w": 3}')
  manifest.write(
    epath.Path(tmp_path),
    Manifest(7, TREE, {'next_batch': 123}, {'loss': 0.1}, {}),
  )
  return epath.Path(tmp_path)


def verify(folder):
  manifest.verify(folder, manifest.read(folder))


def test_what_was_written_is_read_and_verifies(folder):
  read = manifest.read(folder)
  assert (read.step, read.tree, read.extra, read.metrics) == (
    7,
    TREE,
    {'next_batch': 123},
    {'loss': 0.1},
  )
  assert {path: size for path, (size, _) in read.files.items()} == {
    'd/arrays': 1024,
    'meta': 8,
  }
  verify(folder)


def test_extra_files_are_ignored(folder):
  (folder / 'd' / '.nfs0001').write_text('of a network file system')
  verify(folder)


@pytest.mark.parametrize('path', ['d/arrays', 'meta', 'manifest.json'])
def test_any_flipped_bit_is_found(folder, path):
  content = (folder / path).read_bytes()
  for position in range(0, len(content), max(1, len(content) // 41)):
    for bit in (0, 3, 5, 7):
      flipped = bytearray(content)
      flipped[position] ^= 1 << bit
      (folder / path).write_bytes(bytes(flipped))
      with pytest.raises(BadCheckpoint, match=r'altered|unreadable'):
        verify(folder)
  (folder / path).write_bytes(content)
  verify(folder)


def test_a_number_changed_in_the_manifest_is_found(folder):
  text = (folder / manifest.NAME).read_text()
  assert text.count('123') == 1
  (folder / manifest.NAME).write_text(text.replace('123', '124'))
  with pytest.raises(BadCheckpoint, match='manifest altered'):
    manifest.read(folder)


def test_missing_truncated_and_absent_files_have_their_reasons(folder):
  (folder / 'd' / 'arrays').write_bytes(b'short')
  with pytest.raises(BadCheckpoint, match='d/arrays has 5 bytes, not 1024'):
    verify(folder)
  (folder / 'd' / 'arrays').unlink()
  with pytest.raises(BadCheckpoint, match='d/arrays missing'):
    verify(folder)
  (folder / manifest.NAME).unlink()
  with pytest.raises(BadCheckpoint, match='no manifest'):
    verify(folder)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"sha256": 3', '\0' * 40])
def test_an_unreadable_manifest_is_bad_not_a_crash(folder, text):
  (folder / manifest.NAME).write_text(text)
  with pytest.raises(BadCheckpoint, match='manifest unreadable'):
    manifest.read(folder)


def test_another_format_is_refused(folder, monkeypatch):
  monkeypatch.setattr(manifest, '_FORMAT', 2)
  with pytest.raises(BadCheckpoint, match='manifest format 1, not 2'):
    manifest.read(folder)
  assert json.loads((folder / manifest.NAME).read_text())['format'] == 1


def test_a_tree_is_described_by_path_shape_and_dtype():
  Pair = collections.namedtuple('Pair', ['mu', 'empty'])
  state = {
    'layers': [jnp.zeros((2, 3), jnp.bfloat16), None],
    'adam': Pair(jax.ShapeDtypeStruct((), jnp.int32), ()),
  }
  assert manifest.describe(state) == {
    'adam/mu': 'int32[]',
    'layers/0': 'bfloat16[2,3]',
  }


def test_differences_are_few_lines_however_many_they_are():
  wanted = {f'w{i}': 'float32[2]' for i in range(10)} | {'b': 'float32[3]'}
  saved = {'b': 'bfloat16[3]', 'old': 'int32[]'}
  assert manifest.difference(saved, wanted).splitlines() == [
    'missing: w0, w1, w2, w3 and 6 more',
    'unexpected: old',
    'different: b (saved bfloat16[3], wanted float32[3])',
  ]
  assert manifest.difference(wanted, wanted) == ''
