"""Reading of a checkpoint's tensors by name, a slice at a time.

Files are safetensors, or PyTorch's older files, which PyTorch's weights-only
loader reads, so that no code is unpickled.
"""

import functools
import math
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax.data.plain_files import is_name, plain, read_json
from moe_jax.errors import InputError

SAFETENSORS, TORCH = 'model.safetensors', 'pytorch_model.bin'
_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
FLOATS = ('bfloat16', 'float16', 'float32')
_EXPONENTS = {
  'bfloat16': np.uint16(0x7F80),
  'float16': np.uint16(0x7C00),
  'float32': np.uint32(0x7F800000),
}
_CHUNK = 2**16  # the number of values that fit into a processor's cache
_SHOWN = 8
_LISTED = 100

Index = tuple[slice, ...]


class TensorSpec(NamedTuple):
  """A tensor's shape and dtype, one of `FLOATS` or else as files name it."""

  shape: tuple[int, ...]
  dtype: str

  @property
  def num_bytes(self) -> int:
    """The size in memory in bytes; 0 for a dtype that is not in `FLOATS`."""
    if self.dtype not in FLOATS:
      return 0
    width = 4 if self.dtype == 'float32' else 2
    return width * math.prod(self.shape)


class TensorFiles:
  """The tensors in the files of a folder; the files stay open.

  Attributes:
    folder: The folder of the files.
    specs: The shape and dtype of every tensor, by its name.
    nonfinite: For each tensor with values that are not finite, their number, as
      far as `note_nonfinite` was called.

  Raises:
    ValueError: The folder has no weights, a file in the index is missing or
      damaged, or index and files disagree; all problems are listed.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._readers: dict[str, _SafeTensors | _Torch] = {}
    self.specs: dict[str, TensorSpec] = {}
    self._file_of: dict[str, str] = {}
    self.nonfinite: dict[str, int] = {}
    names, index = _weight_files(folder)
    problems, unread = [], set()
    for name in names:
      try:
        specs = self._reader(name).specs
      except (OSError, InputError) as error:
        problems.append(f'{name}: {error}')
        unread.add(name)
        continue
      for tensor, spec in specs.items():
        if not tensor.isprintable():
          problems.append(f'{name} has a tensor with the name {tensor!r:.80}')
        if index and index.get(tensor) != name:
          problems.append(f'{name} holds {tensor!r}, which the index does not')
        self.specs[tensor], self._file_of[tensor] = spec, name
    problems += [
      f'the index has {tensor!r} in {name}, which does not hold it'
      for tensor, name in index.items()
      if tensor not in self.specs and name not in unread
    ]
    if problems:
      raise ProblemsError(f'{folder} cannot be read', problems)

  @functools.cached_property
  def num_values(self) -> int:
    """The number of values of all tensors together."""
    return sum(math.prod(spec.shape) for spec in self.specs.values())

  @functools.cached_property
  def dtype(self) -> str:
    """The dtype in `FLOATS` with the most bytes; if there is none, bfloat16."""
    sizes = dict.fromkeys(FLOATS, 0)
    for spec in self.specs.values():
      if spec.dtype in sizes:
        sizes[spec.dtype] += spec.num_bytes
    return max(sizes, key=lambda name: sizes[name])

  @functools.cached_property
  def largest(self) -> int:
    """The size of the largest tensor in bytes."""
    return max(spec.num_bytes for spec in self.specs.values())

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """A copy of a tensor's slice `index`, None for all, in its stored dtype."""
    if index is None:
      index = tuple(slice(0, size) for size in self.specs[name].shape)
    return self._reader(self._file_of[name]).read(name, index)

  def note_nonfinite(self, name: str, part: np.ndarray) -> None:
    """Adds to `nonfinite[name]` how many values of `part` are not finite."""
    if count := count_nonfinite(part):
      self.nonfinite[name] = self.nonfinite.get(name, 0) + count

  def _reader(self, file: str) -> '_SafeTensors | _Torch':
    if file not in self._readers:
      # To save memory, a file whose tensors are all held in memory is dropped
      # before the next file is read.
      self._readers = {
        name: reader
        for name, reader in self._readers.items()
        if not reader.in_memory
      }
      path = plain(self.folder, file)
      if path is None:
        raise InputError('there is no such file')
      reader_class = _SafeTensors if file.endswith('.safetensors') else _Torch
      self._readers[file] = reader_class(path)
    return self._readers[file]


class _SafeTensors:
  """A reader of one safetensors file."""

  in_memory = False

  def __init__(self, path: pathlib.Path):
    try:
      # If the file were mapped into memory, the pages that were read would
      # count as memory of this process until it ends.
      self._file = safe_open(path, framework='numpy', backend='pread')
    except SafetensorError as error:
      raise InputError(f'no safetensors file: {error}') from None
    self.specs = {}
    for name in self._file.keys():  # noqa: SIM118 (it is no mapping)
      part = self._file.get_slice(name)
      dtype = str(part.get_dtype())
      shape = tuple(part.get_shape())
      self.specs[name] = TensorSpec(shape, _DTYPES.get(dtype, dtype))

  def read(self, name: str, index: Index) -> np.ndarray:
    if not index:
      return self._file.get_tensor(name)
    return self._file.get_slice(name)[index]


class _Torch:
  """A reader of one PyTorch file, memory-mapped where its format allows."""

  def __init__(self, path: pathlib.Path):
    try:
      import torch
    except ImportError:
      raise InputError(
        'reading PyTorch files needs PyTorch: pip install torch'
      ) from None
    load: dict[str, Any] = dict(map_location='cpu', weights_only=True)
    # Files from before PyTorch 1.6 are no zip files and cannot be mapped.
    self.in_memory = not zipfile.is_zipfile(path)
    try:
      self._tensors = torch.load(path, mmap=not self.in_memory, **load)
    except Exception as error:  # of pickle, zip or PyTorch
      # PyTorch's own message is not shown, as it says how to unpickle the file
      # nevertheless.
      raise InputError(
        'no file of PyTorch weights: it is damaged, or holds other objects than'
        f' tensors, which are never unpickled ({type(error).__name__})'
      ) from None
    if not isinstance(self._tensors, Mapping):
      raise InputError(f'it holds a {type(self._tensors).__name__}, no mapping')
    self._bfloat16, self._int16 = torch.bfloat16, torch.int16
    self.specs = {
      str(name): TensorSpec(tuple(value.shape), str(value.dtype)[6:])
      if isinstance(value, torch.Tensor) and value.layout == torch.strided
      else TensorSpec((), str(getattr(value, 'layout', type(value).__name__)))
      for name, value in self._tensors.items()
    }

  def read(self, name: str, index: Index) -> np.ndarray:
    part = self._tensors[name].detach()[index]
    if part.dtype != self._bfloat16:
      return part.numpy().copy()
    bits = part.contiguous().view(self._int16).numpy()
    return bits.view(ml_dtypes.bfloat16).copy()


def count_nonfinite(array: np.ndarray) -> int:
  """The number of values that are not finite, for a dtype of `FLOATS`.

  Such a value has all bits of its exponent set. The bits are compared, since
  NumPy's operations on bfloat16 are slow.
  """
  exponent = _EXPONENTS[array.dtype.name]
  bits = array.view(exponent.dtype).ravel(order='K')  # often no copy
  return sum(
    int(np.count_nonzero((bits[i : i + _CHUNK] & exponent) == exponent))
    for i in range(0, bits.size, _CHUNK)
  )


def _weight_files(folder: pathlib.Path) -> tuple[list[str], dict[str, str]]:
  """The names of the files of weights, and the index's file for each tensor.

  If there is no index, all weights are in one file, and the second result is
  empty.
  """
  for name in (SAFETENSORS, TORCH):
    if plain(folder, name) is not None:
      return [name], {}
    path = plain(folder, f'{name}.index.json')
    if path is not None:
      index = _read_index(path, pathlib.PurePath(name).suffix)
      return sorted(set(index.values())), index
  file_names = sorted(p.name for p in folder.iterdir())[:_SHOWN]
  raise InputError(
    f'{folder} has no weights: none of {SAFETENSORS}, {SAFETENSORS}.index.json,'
    f' {TORCH}, {TORCH}.index.json; it has {file_names}'
  )


def _read_index(path: pathlib.Path, ending: str) -> dict[str, str]:
  index = read_json(path).get('weight_map')
  if not isinstance(index, dict) or not index:
    raise InputError(f"{path} is damaged: it has no object 'weight_map'")
  for name in index.values():
    # An index may be from a download, and must neither lead out of its folder
    # nor from safetensors to a pickle.
    if not is_name(name) or not name.endswith(ending):
      raise InputError(
        f'{path} names {name!r:.80}, which is no file beside it with a name '
        f'that ends in {ending}'
      )
  return index


class ProblemsError(InputError):
  """An error with a line for each of the first `_LISTED` problems.

  Attributes:
    problems: A text for each problem.
  """

  def __init__(self, headline: str, problems: list[str]):
    self.problems = problems
    lines = [f'{headline}:', *(f'  {line}' for line in problems[:_LISTED])]
    if len(problems) > _LISTED:
      lines.append(f'  and {len(problems) - _LISTED} more')
    super().__init__('\n'.join(lines))
