"""Where texts come from: the embedded corpus, files, or a TFDS dataset.

A source streams the documents of two splits and has an identity that changes
with their content. Not here: tokens (`store.py`).
"""

import contextlib
import dataclasses
import glob
import hashlib
import io
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from moe_jax.config import unknown
from moe_jax.data import python_stdlib
from moe_jax.data.store import Digest, cache_root, prepared

KINDS = ('python_stdlib', 'python_stdlib:<modules>', 'files:<glob>')
KINDS += ('tfds:<name>',)
SPLITS = ('train', 'validation')


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents in two splits.

  Attributes:
    name: For people.
    identity: Equal only for equal documents in equal order; no pass over the
      documents of a TFDS dataset is made for it.
    documents: `documents('train')` and `documents('validation')` stream the
      texts, each time anew and in the same order.
  """

  name: str
  identity: str
  documents: Callable[[str], Iterator[str]]


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which part of a source is wanted.

  `splits` are the source's own names of our train and validation split; in a
  TFDS dataset any split expression, such as 'train[90%:]'. `text_feature` is
  the TFDS feature with the text.
  """

  splits: tuple[str, str] = SPLITS
  text_feature: str = 'text'


def open_source(
  spec: str, selection: Selection | None = None, cache_dir: str = ''
) -> Source:
  """The source that `spec` names.

  - `python_stdlib`: the running Python's standard library; prepared by TFDS
    under `cache_dir`. `python_stdlib:json,email` is a part of it.
  - `files:<glob>`: UTF-8 text files, `**` for any depth. The first 90 % of the
    characters of a single file are for training, the rest for validation; of
    several files, about one in ten is for validation, by a hash of its name.
    Files are read whole, one at a time.
  - `tfds:<name>`: a TFDS dataset in array_record format under $TFDS_DATA_DIR
    or ~/tensorflow_datasets, prepared first where that needs no TensorFlow.

  Raises:
    ValueError: `spec` is of no such kind, or names what does not exist or
      cannot be prepared.
  """
  selection = selection or Selection()
  kind, colon, argument = spec.partition(':')
  if kind == 'python_stdlib' and bool(colon) == bool(argument):
    return _python_stdlib(argument, selection, cache_dir)
  if kind == 'files' and argument:
    return _files(argument, selection)
  if kind == 'tfds' and argument:
    return _tfds(argument, selection)
  raise unknown('source', spec, KINDS)


def _python_stdlib(
  argument: str, selection: Selection, cache_dir: str
) -> Source:
  modules = argument.split(',') if argument else python_stdlib.MODULES
  files = list(python_stdlib.source_files(modules))
  splits = {python_stdlib.split_of(name) for name, _ in files}
  if splits != set(SPLITS):
    raise ValueError(
      f'the {len(files)} files of python_stdlib:{argument} give no split '
      f'{sorted(set(SPLITS) - splits)} (one file in 20 is for validation); '
      'name more modules'
    )
  digest = python_stdlib.content_digest(files)
  folder = cache_root(cache_dir) / 'tfds' / f'python_stdlib-{digest[:16]}'

  def builder(data_dir):
    return python_stdlib.PythonStdlib(
      modules=modules, data_dir=data_dir, file_format='array_record'
    )

  def write(unfinished):
    # TFDS would announce this temporary folder as the place of the data, and
    # fill a log with progress bars for half a second's work.
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
      builder(unfinished).download_and_prepare()

  def documents(split):
    made = builder(prepared(folder, write))
    return _texts(made, selection, split)

  name = f'python_stdlib{":" * bool(argument)}{argument} of Python '
  return Source(
    name + platform.python_version(), f'{digest} {selection}', documents
  )


def _files(pattern: str, selection: Selection) -> Source:
  for split in selection.splits:
    if split not in SPLITS:
      raise unknown('split of files', split, SPLITS)
  pattern = os.path.expanduser(pattern)
  found = glob.glob(pattern, recursive=True)
  paths = [pathlib.Path(p) for p in sorted(found) if os.path.isfile(p)]
  if not paths:
    raise ValueError(f'no file matches {pattern!r} in {os.getcwd()}')
  parts = _file_splits(paths, pattern)
  digest = Digest()
  for split in SPLITS:
    digest.split(split)
    for path in parts[split]:
      digest.text(path.read_bytes())

  def documents(split):
    own = selection.splits[SPLITS.index(split)]
    for path in parts[own]:
      text = _read_text(path)
      if len(paths) == 1:
        cut = int(len(text) * 0.9)
        text = text[:cut] if own == 'train' else text[cut:]
      yield text

  name = f'files:{pattern} ({len(paths)} found)'
  identity = f'{digest.hexdigest()} {len(paths) == 1} {selection.splits}'
  return Source(name, identity, documents)


def _file_splits(
  paths: list[pathlib.Path], pattern: str
) -> dict[str, list[pathlib.Path]]:
  """About one path in ten is for validation, at least one for each split."""
  if len(paths) == 1:
    return {'train': paths, 'validation': paths}
  # Relative to what the pattern fixes, so that the split moves with the files.
  fixed = pathlib.Path(pattern.split('*')[0].split('?')[0].split('[')[0])
  base = fixed if pattern.startswith(f'{fixed}{os.sep}') else fixed.parent

  def rank(path):
    name = os.path.relpath(path, base).replace(os.sep, '/')
    return hashlib.sha256(name.encode()).digest()

  # The lowest and the highest rank keep a split from being empty.
  lowest, *others = sorted(paths, key=rank)
  highest = others[-1]
  held_out = {p for p in others if p != highest and rank(p)[0] < 256 // 10}
  held_out.add(lowest)
  return {
    'train': [p for p in paths if p not in held_out],
    'validation': [p for p in paths if p in held_out],
  }


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_bytes().decode()
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8: {error}') from error


def _tfds(name: str, selection: Selection) -> Source:
  builder = _prepared_builder(name)
  for split in SPLITS:  # now, though the tokens may be in the cache
    _data_source(builder, selection, split)
  identity = hashlib.sha256(builder.info.as_json.encode())
  for split in builder.info.splits.values():
    for path in map(os.fspath, split.filepaths):
      # A path in a bucket is told apart by its name alone.
      changed = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
      identity.update(f'{path} {changed}\n'.encode())
  return Source(
    f'tfds:{builder.info.full_name}',
    f'{identity.hexdigest()} {selection}',
    lambda split: _texts(builder, selection, split),
  )


def _prepared_builder(name: str) -> tfds.core.DatasetBuilder:
  data_dir = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  data_dir = os.path.expanduser(data_dir)
  elsewhere = (
    'prepare it on a machine with TensorFlow, by tfds.builder('
    f"{name!r}, file_format='array_record').download_and_prepare(), and set "
    f'TFDS_DATA_DIR (now {data_dir!r}) to the folder it is in'
  )
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    builder.download_and_prepare()
  except tfds.core.DatasetNotFoundError as error:
    raise ValueError(
      f'TFDS dataset {name!r} is not here ({_prepared(data_dir)} are), '
      f'nor can it be prepared without TensorFlow; if it exists, {elsewhere}'
    ) from error
  except Exception as error:  # builders and downloads raise what they like
    raise ValueError(
      f'TFDS dataset {name!r} could not be prepared here '
      f'({type(error).__name__}: {error}); {elsewhere}'
    ) from error
  return builder


def _prepared(data_dir: str) -> list[str]:
  """Names of the datasets in `data_dir`."""
  root = pathlib.Path(data_dir)
  found = [
    path.relative_to(root).parts[0]
    for versions in ('*/*', '*/*/*')  # without and with a builder config
    for path in root.glob(f'{versions}/dataset_info.json')
  ]
  return sorted(set(found))


def _data_source(
  builder: tfds.core.DatasetBuilder, selection: Selection, ours: str
) -> Sequence[Any]:
  """The examples of our train or validation split."""
  feature, have = selection.text_feature, builder.info.features
  if feature not in have:
    raise unknown(f'text_feature of {builder.name!r}', feature, have)
  split = selection.splits[SPLITS.index(ours)]
  try:
    return builder.as_data_source(split=split)
  except NotImplementedError as error:  # not a format of random access
    raise ValueError(f'TFDS dataset {builder.name!r}: {error}') from error
  except ValueError as error:
    raise ValueError(
      f'unknown split {split!r} of {builder.name!r}; have '
      f'{sorted(builder.info.splits)} and parts of them ({error})'
    ) from error


def _texts(
  builder: tfds.core.DatasetBuilder, selection: Selection, split: str
) -> Iterator[str]:
  feature = selection.text_feature
  for i, example in enumerate(_data_source(builder, selection, split)):
    yield _as_text(example[feature], f'{feature!r} {i} of {builder.name!r}')


def _as_text(value: Any, where: str) -> str:
  if isinstance(value, str):
    return value
  if not isinstance(value, bytes):
    raise ValueError(f'{where} has type {type(value).__name__}, not text')
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise ValueError(f'{where} is not UTF-8: {error}') from error
