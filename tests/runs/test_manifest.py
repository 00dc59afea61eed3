"""Damages of a folder that the manifest detects, one at a time."""

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
