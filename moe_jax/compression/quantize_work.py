"""The work of a command that quantises, kept until its run is written.

Each layer that is done is a safetensors file in a folder beside the new run, so
that a command that was killed goes on after it. Nothing is unpickled.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.compression.grids import Rounded
from moe_jax.compression.quantize_layers import Spot
from moe_jax.compression.quantize_report import Report
from moe_jax.data.cache_folders import locked
from moe_jax.errors import InputError, writing
from moe_jax.kernels.quantized import TernaryGrid, UniformGrid
from moe_jax.layers.kernel_format import BITS, KernelFormat
from moe_jax.runs import new_run
from moe_jax.runs.workdir import write_text

_SETTINGS, _REPORT = 'settings.json', 'report'


class Work:
  """The layers that are done, in a folder of their own."""

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any]):
    """Opens the folder, or makes it.

    Args:
      folder: The folder of the work.
      settings: The values on which the layers depend, as JSON can hold them.

    Raises:
      ValueError: The folder has work of other settings.
    """
    self.folder = folder
    path, settings = self.folder / _SETTINGS, json.loads(json.dumps(settings))
    if path.exists():
      stored_settings = json.loads(path.read_text(encoding='utf-8'))
      changed = sorted(
        key
        for key in stored_settings.keys() | settings.keys()
        if stored_settings.get(key) != settings.get(key)
      )
      if changed:
        differences = '; '.join(
          f'{key}: {stored_settings.get(key)!r} -> {settings.get(key)!r}'
          for key in changed
        )
        raise InputError(
          f'{self.folder} has the work of another command that was killed '
          f'({differences}); give its arguments, or remove that folder'
        )
    self.folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1) + '\n')

  def save(
    self, layer: int, kernels: Mapping[Spot, Rounded], report: Report
  ) -> None:
    """Saves a layer, and the report about it."""
    arrays = {
      f'{_name(spot)}:{part}': np.ascontiguousarray(array)
      for spot, rounded in kernels.items()
      for part, array in _arrays(rounded).items()
    }
    path = _path(self.folder, layer)
    unfinished = path.with_suffix('.tmp')
    text = json.dumps(dataclasses.asdict(report))
    save_file(arrays, unfinished, {_REPORT: text})
    unfinished.replace(path)

  def load(
    self, layer: int, spots: Iterable[Spot], format: KernelFormat
  ) -> tuple[dict[Spot, Rounded], Report] | None:
    """A layer's kernels and report; None for a layer that is not done.

    Args:
      layer: The number of the layer.
      spots: The kernels of the layer.
      format: Their format.

    Raises:
      ValueError: The file is damaged.
    """
    path = _path(self.folder, layer)
    if not path.exists():
      return None
    try:
      file = safe_open(path, framework='numpy', backend='pread')
      kernels = {spot: _rounded(file, _name(spot), format) for spot in spots}
      return kernels, Report(**json.loads(file.metadata()[_REPORT]))
    except (OSError, SafetensorError) as error:
      raise InputError(
        f'{path} cannot be read: {error}; remove it, and the layer is made '
        'again'
      ) from None

  def remove(self) -> None:
    """Removes the folder, so that half of it is never read as work."""
    removed = self.folder.with_name(f'.{self.folder.name}.removed')
    shutil.rmtree(removed, ignore_errors=True)
    self.folder.rename(removed)
    shutil.rmtree(removed)


@contextlib.contextmanager
def opened(
  output: pathlib.Path, settings: Mapping[str, Any], layers: Iterable[int]
) -> Iterator[Work]:
  """The work for a new run, which no other command changes meanwhile.

  It is removed after the body, which writes the run unless a command that was
  killed after the last layer has written it.

  Args:
    output: The folder of the new run.
    settings: The values on which the layers depend, as JSON can hold them.
    layers: The numbers of all layers.

  Raises:
    ValueError: `output` is not free, or the work is of other settings.
  """
  folder = _folder_of(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  with locked(folder), writing(folder):
    if not all(_path(folder, layer).exists() for layer in layers):
      new_run.check_free(output)
    work = Work(folder, settings)
    yield work
    work.remove()


def check_free(output: pathlib.Path) -> None:
  """Raises ValueError for a folder that is not free and has no work."""
  if not _folder_of(output).exists():
    new_run.check_free(output)


def _folder_of(output: pathlib.Path) -> pathlib.Path:
  return output.with_name(f'{output.name}.unfinished')


def _path(folder: pathlib.Path, layer: int) -> pathlib.Path:
  return folder / f'layer_{layer}.safetensors'


def _name(spot: Spot) -> str:
  return f'{"/".join(spot.path)}:{spot.index}'


def _arrays(rounded: Rounded) -> dict[str, np.ndarray]:
  grid = rounded.grid
  if isinstance(grid, TernaryGrid):
    return {'codes': rounded.codes, 'low': grid.low, 'high': grid.high}
  return {'codes': rounded.codes, 'scale': grid.scale, 'zero': grid.zero}


def _rounded(file: Any, name: str, format: KernelFormat) -> Rounded:
  def tensor(part):
    return file.get_tensor(f'{name}:{part}')

  if format.name in BITS:
    grid = UniformGrid(tensor('scale'), tensor('zero'), BITS[format.name])
  else:
    grid = TernaryGrid(tensor('low'), tensor('high'))
  return Rounded(tensor('codes'), grid)
