"""A checkpoint's tensors by name, read a slice at a time.

Reads safetensors, and PyTorch's older files through its weights-only loader:
nothing is ever unpickled as code. Not here: what the tensors mean
(`mapping.py`), and writing (`saving.py`).
"""

import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SAFETENSORS, TORCH = 'model.safetensors', 'pytorch_model.bin'
_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
FLOATS = ('bfloat16', 'float16', 'float32')
_SHOWN = 8

Index = tuple[slice, ...]


class TensorSpec(NamedTuple):
  """What a file says of a tensor before it is read."""

  shape: tuple[int, ...]
  dtype: str

  @property
  def num_bytes(self) -> int:
    """The bytes in memory; 0 for a type that is no float of ours."""
    if self.dtype not in FLOATS:
      return 0
    width = 4 if self.dtype == 'float32' else 2
    return width * int(np.prod(self.shape, dtype=np.int64))


class TensorFiles:
  """All tensors of a folder, whose files stay open, unread.

  Attributes:
    folder: The folder of the files.
    specs: The shape and type of every tensor, by its name.
    num_bytes: The bytes of all tensors together.
    largest: The bytes of the largest tensor.

  Raises:
    ValueError: There are no weights, a file named by the index is missing or
      damaged, or index and files disagree; all that is wrong is listed.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._readers: dict[str, _SafeTensors | _Torch] = {}
    self.specs: dict[str, TensorSpec] = {}
    self._file_of: dict[str, str] = {}
    names, index = _files(folder)
    problems, unread = [], set()
    for name in names:
      try:
        found = self._reader(name).specs
      except (OSError, ValueError) as error:
        problems.append(f'{name}: {error}')
        unread.add(name)
        continue
      for tensor, spec in found.items():
        if index and index.get(tensor) != name:
          problems.append(f'{name} holds {tensor!r}, which the index does not')
        self.specs[tensor], self._file_of[tensor] = spec, name
    problems += [
      f'the index has {tensor!r} in {name}, which does not hold it'
      for tensor, name in index.items()
      if tensor not in self.specs and name not in unread
    ]
    if problems:
      raise ValueError(listed(f'{folder} cannot be read', problems))
    self.num_bytes = sum(spec.num_bytes for spec in self.specs.values())
    self.largest = max(spec.num_bytes for spec in self.specs.values())

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """A copy of a slice of a tensor, as it is stored; None is all of it."""
    if index is None:
      index = tuple(slice(0, size) for size in self.specs[name].shape)
    return self._reader(self._file_of[name]).read(name, index)

  def _reader(self, file: str) -> '_SafeTensors | _Torch':
    if file not in self._readers:
      # What is in memory whole goes before the next of its kind comes.
      self._readers = {
        name: reader
        for name, reader in self._readers.items()
        if not reader.in_memory
      }
      kind = _SafeTensors if file.endswith('.safetensors') else _Torch
      self._readers[file] = kind(self.folder / file)
    return self._readers[file]


class _SafeTensors:
  """One safetensors file."""

  in_memory = False

  def __init__(self, path: pathlib.Path):
    try:
      # Mapped pages would count as this process's memory until it ends.
      self._file = safe_open(path, framework='numpy', backend='pread')
    except SafetensorError as error:
      raise ValueError(f'no safetensors file: {error}') from None
    self.specs = {}
    for name in self._file.keys():  # noqa: SIM118 (it is no mapping)
      part = self._file.get_slice(name)
      dtype = part.get_dtype()
      shape = tuple(part.get_shape())
      self.specs[name] = TensorSpec(shape, _DTYPES.get(dtype, dtype))

  def read(self, name: str, index: Index) -> np.ndarray:
    """A copy of a slice of a tensor."""
    if not index:
      return self._file.get_tensor(name)
    return self._file.get_slice(name)[index]


class _Torch:
  """One file of PyTorch's, mapped into memory where its format allows."""

  def __init__(self, path: pathlib.Path):
    try:
      import torch
    except ImportError:
      raise ValueError(
        'reading PyTorch files needs PyTorch: pip install torch'
      ) from None
    load = dict(map_location='cpu', weights_only=True)
    # The format before PyTorch 1.6, which is no zip file, cannot be mapped.
    self.in_memory = not zipfile.is_zipfile(path)
    try:
      self._tensors = torch.load(path, mmap=not self.in_memory, **load)
    except Exception as error:  # pickle's, zip's and PyTorch's own
      first = str(error).strip().split('\n', 1)[0]
      raise ValueError(f'no file of PyTorch weights: {first}') from None
    if not isinstance(self._tensors, Mapping):
      raise ValueError(f'it holds a {type(self._tensors).__name__}, no mapping')
    self._bfloat16, self._int16 = torch.bfloat16, torch.int16
    self.specs = {
      str(name): TensorSpec(tuple(value.shape), str(value.dtype)[6:])
      if isinstance(value, torch.Tensor)
      else TensorSpec((), type(value).__name__)
      for name, value in self._tensors.items()
    }

  def read(self, name: str, index: Index) -> np.ndarray:
    """A copy of a slice of a tensor."""
    part = self._tensors[name].detach()[index]
    if part.dtype != self._bfloat16:
      return part.numpy().copy()
    bits = part.contiguous().view(self._int16).numpy()
    return bits.view(ml_dtypes.bfloat16).copy()


def _files(folder: pathlib.Path) -> tuple[list[str], dict[str, str]]:
  """The files of the weights, and the file of each tensor of an index."""
  for name in (SAFETENSORS, TORCH):
    if (folder / name).is_file():
      return [name], {}
    path = folder / f'{name}.index.json'
    if path.is_file():
      index = _index(path)
      return sorted(set(index.values())), index
  there = sorted(p.name for p in folder.iterdir())[:_SHOWN]
  raise ValueError(
    f'{folder} has no weights: none of {SAFETENSORS}, {SAFETENSORS}.index.json,'
    f' {TORCH}, {TORCH}.index.json; it has {there}'
  )


def _index(path: pathlib.Path) -> dict[str, str]:
  try:
    index = dict(json.loads(path.read_text(encoding='utf-8'))['weight_map'])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is damaged: {error!r}') from None
  for name in index.values():
    # An index came with a download; it may not lead out of its folder.
    if pathlib.PurePath(name).name != name:
      raise ValueError(f'{path} names {name!r}, which is no file beside it')
  return index


def listed(what: str, problems: list[str]) -> str:
  """A text of all that is wrong, a line for each problem."""
  return '\n'.join([f'{what}:', *(f'  {problem}' for problem in problems)])
