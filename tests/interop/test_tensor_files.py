"""Files of tensors that others wrote, and those that must not be read."""

import json

import ml_dtypes
import numpy as np
import pytest

from moe_jax.interop.tensor_files import TensorFiles, TensorSpec

torch = pytest.importorskip('torch')
save_file = pytest.importorskip('safetensors.torch').save_file

TENSORS = {
  'a': torch.arange(12.0).reshape(3, 4),
  'b': torch.tensor([1.5, -2.25]).bfloat16(),
  'c': torch.full((2, 1, 3), 0.1).half(),
  'd': torch.tensor(7.0),
}


def single(folder):
  save_file(TENSORS, folder / 'model.safetensors')


def sharded(folder):
  files = {'a': 'x-1.safetensors', 'b': 'x-2.safetensors'}
  files |= {'c': 'x-1.safetensors', 'd': 'x-2.safetensors'}
  for file in set(files.values()):
    tensors = {n: t for n, t in TENSORS.items() if files[n] == file}
    save_file(tensors, folder / file)
  index(folder / 'model.safetensors.index.json', files)


def index(path, files):
  path.write_text(json.dumps({'metadata': {}, 'weight_map': files}))


def pickled(folder, **options):
  torch.save(TENSORS, folder / 'pytorch_model.bin', **options)


def pickled_before_zip(folder):
  pickled(folder, _use_new_zipfile_serialization=False)


def pickled_in_shards(folder):
  files = {name: f'p-{name}.bin' for name in TENSORS}
  for name, file in files.items():
    torch.save({name: TENSORS[name]}, folder / file)
  index(folder / 'pytorch_model.bin.index.json', files)


@pytest.mark.parametrize(
  'write', [single, sharded, pickled, pickled_before_zip, pickled_in_shards]
)
def test_every_format_gives_the_same(write, tmp_path):
  write(tmp_path)
  files = TensorFiles(tmp_path)
  assert files.specs == {
    'a': TensorSpec((3, 4), 'float32'),
    'b': TensorSpec((2,), 'bfloat16'),
    'c': TensorSpec((2, 1, 3), 'float16'),
    'd': TensorSpec((), 'float32'),
  }
  assert files.largest == 48
  part = files.read('a', (slice(1, 3), slice(0, 2)))
  np.testing.assert_array_equal(part, [[4, 5], [8, 9]])
  part[:] = 0  # `part` is a copy
  np.testing.assert_array_equal(files.read('a'), np.arange(12).reshape(3, 4))
  half = files.read('b')
  assert half.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(half.astype(np.float32), [1.5, -2.25])
  assert files.read('c').dtype == np.float16
  np.testing.assert_array_equal(files.read('c'), TENSORS['c'].numpy())
  assert files.read('d') == 7


def test_safetensors_come_first(tmp_path):
  pickled(tmp_path)
  save_file({'a': torch.zeros(1)}, tmp_path / 'model.safetensors')
  assert list(TensorFiles(tmp_path).specs) == ['a']


def test_all_that_is_wrong_is_listed(tmp_path):
  tensors = {'a': torch.zeros(1), 'e': torch.zeros(1)}
  save_file(tensors, tmp_path / 'x.safetensors')
  (tmp_path / 'junk.safetensors').write_bytes(b'no header' * 9)
  stems = {'a': 'x', 'b': 'x', 'c': 'gone', 'd': 'junk'}
  indexed = {name: f'{stem}.safetensors' for name, stem in stems.items()}
  index(tmp_path / 'model.safetensors.index.json', indexed)
  with pytest.raises(ValueError, match='cannot be read') as caught:
    TensorFiles(tmp_path)
  message = str(caught.value)
  for part in (
    "x.safetensors holds 'e', which the index does not",
    "the index has 'b' in x.safetensors, which does not hold it",
    'gone.safetensors: ',
    'junk.safetensors: no safetensors file',
  ):
    assert part in message


def test_no_weights(tmp_path):
  (tmp_path / 'notes.txt').write_text('x')
  with pytest.raises(ValueError, match=r'none of model.safetensors, .*notes'):
    TensorFiles(tmp_path)
