"""The manifest of a checkpoint: a list of its files and arrays.

It is a JSON file with the size and digest of every other file and a digest of
its own, so that any flipped bit is noticed.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, cast

import jax
from etils import epath

from moe_jax.errors import InputError
from moe_jax.partitioning import path_name
from moe_jax.runs import finite

NAME = 'manifest.json'
_FORMAT = 1
MOST_STEPS = 2**31  # steps are counted in int32
_FLOAT = re.compile(r'^b?float\d+')


class BadCheckpoint(Exception):
  """The reason why a folder is not a good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Contents of a checkpoint's manifest.

  Attributes:
    step: The optimizer step after which the checkpoint was saved.
    tree: The dtype and shape of every array of the state by its path, such as
      `{'params/w': 'float32[3,4]'}`.
    extra: JSON values that the caller saves with the state.
    metrics: Metrics of this step, by which the best checkpoint is chosen.
    files: Size in bytes and sha256 in hex of each file, by the file's path
      within the folder.
  """

  step: int
  tree: dict[str, str]
  extra: dict[str, Any]
  metrics: dict[str, float]
  files: dict[str, tuple[int, str]]


def make(
  step: int, state: Any, extra: dict[str, Any], metrics: Mapping[str, Any]
) -> Manifest:
  """The manifest of a state that is to be saved, still without `files`.

  Raises:
    ValueError: A leaf is no jax array.
    TypeError: `extra` is not JSON.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    kind = str(getattr(leaf, 'dtype', type(leaf).__name__))
    if not isinstance(leaf, jax.Array) or kind.startswith('key<'):
      raise InputError(
        f'state leaf {path_name(path)!r} is {kind}; only a jax.Array is saved, '
        'and a key as its jax.random.key_data'
      )
  # Tuples become lists, as they are when the manifest is read.
  extra = json.loads(json.dumps(extra))
  numbers = {key: float(value) for key, value in metrics.items()}
  return Manifest(step, describe(state), extra, numbers, {})


def write(folder: epath.Path, manifest: Manifest) -> None:
  """Writes the manifest into a folder, all or nothing.

  Args:
    folder: The checkpoint, whose other files are complete.
    manifest: The checkpoint's manifest; `files` is filled in if it is empty.
  """
  files = manifest.files or _file_facts(folder)
  body = dataclasses.asdict(dataclasses.replace(manifest, files=files))
  body['format'] = _FORMAT
  text = json.dumps({**body, 'sha256': _seal(body)}, indent=1)
  partial = folder / f'{NAME}.tmp'
  partial.write_text(text)
  partial.replace(folder / NAME)


def _file_facts(folder: epath.Path) -> dict[str, tuple[int, str]]:
  """The bytes and the sha256 of every file but the manifest, by its path."""
  paths = sorted(
    str((parent / file).relative_to(folder))
    for parent, _, files in folder.walk()
    for file in files
    if not file.startswith(NAME)
  )
  with concurrent.futures.ThreadPoolExecutor() as pool:
    facts = pool.map(lambda path: _size_and_digest(folder / path), paths)
    return dict(zip(paths, facts))


def read(folder: epath.Path) -> Manifest:
  """Reads a manifest and checks its digest, but not the files it lists.

  Raises:
    BadCheckpoint: There is no manifest, or it was changed after writing.
    OSError: The file cannot be read.
  """
  try:
    body = json.loads((folder / NAME).read_text())
    if body.pop('sha256') != _seal(body):
      raise BadCheckpoint('manifest altered')
    if (version := body.pop('format')) != _FORMAT:
      raise BadCheckpoint(f'manifest format {version}, not {_FORMAT}')
    return Manifest(**body)
  except FileNotFoundError:
    raise BadCheckpoint('no manifest') from None
  except (
    ValueError, KeyError, TypeError, AttributeError, RecursionError
  ) as error:  # fmt: skip
    raise BadCheckpoint(f'manifest unreadable ({error!r:.80})') from None


def verify(folder: epath.Path, manifest: Manifest) -> None:
  """Checks size and digest of every file that a manifest lists.

  Other files (a note, a network file system's `.nfs0001`) do no harm and are
  ignored.

  Raises:
    BadCheckpoint: A file is missing, of another size, or altered.
    OSError: A file cannot be read.
  """

  def problem(entry):
    path, (size, digest) = entry
    try:
      stored_size, stored_digest = _size_and_digest(folder / path)
    except FileNotFoundError:
      return f'{path} missing'
    if stored_size != size:
      return f'{path} has {stored_size} bytes, not {size}'
    return None if stored_digest == digest else f'{path} altered'

  with concurrent.futures.ThreadPoolExecutor() as pool:
    for reason in filter(None, pool.map(problem, manifest.files.items())):
      raise BadCheckpoint(reason)


def describe(state: Any) -> dict[str, str]:
  """Dtype and shape of each leaf by path: `{'params/w': 'float32[3,4]'}`."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {
    path_name(path): f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'
    for path, leaf in leaves
  }


def difference(
  saved: Mapping[str, str], wanted: Mapping[str, str], *, cast: bool = False
) -> str:
  """The differences between two trees of arrays as text; '' if there is none.

  There is a line for each kind of difference: missing (wanted, not saved),
  unexpected (saved, not wanted), and different in shape or dtype.

  Args:
    saved: The tree of a checkpoint, from `describe`.
    wanted: The tree that is asked for, from `describe`.
    cast: Whether all floating-point types count as equal.
  """

  def compared(array):
    return _FLOAT.sub('float', array) if cast else array

  paths_by_kind = {
    'missing': [path for path in wanted if path not in saved],
    'unexpected': [path for path in saved if path not in wanted],
    'different': [
      f'{path} (saved {saved[path]}, wanted {wanted[path]})'
      for path in wanted
      if path in saved and compared(saved[path]) != compared(wanted[path])
    ],
  }
  return '\n'.join(
    f'{kind}: {finite.listed(sorted(paths))}'
    for kind, paths in paths_by_kind.items()
    if paths
  )


def _size_and_digest(path: epath.Path) -> tuple[int, str]:
  with path.open('rb') as file:
    digest = hashlib.file_digest(cast(Any, file), 'sha256').hexdigest()
    return file.tell(), digest


def _seal(body: Mapping[str, Any]) -> str:
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
