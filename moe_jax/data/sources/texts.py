"""Where texts come from: the embedded corpus, files, a TFDS dataset, a cipher.

A source streams the documents of two splits and has an identity that changes
with their content. Not here: tokens (`data/store.py`).
"""

import dataclasses
import glob
import hashlib
import os
import pathlib
import platform
from collections.abc import Callable, Iterator

from moe_jax.config import unknown
from moe_jax.data.sources import cipher, python_stdlib, tfds_reader
from moe_jax.data.store import Digest, cache_root

KINDS = ('python_stdlib', 'python_stdlib:<modules>', 'files:<glob>')
KINDS += ('tfds:<name>', 'cipher:<K>', 'cipher:<K>,marked')
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
  - `cipher:<K>`: synthetic. Pieces of `python_stdlib`'s texts, each in one of
    K substitution ciphers; `cipher:<K>,marked`: a piece begins with its
    cipher's mark. `cipher:8:files:*.txt` is of another source's texts.

  Raises:
    ValueError: `spec` is of no such kind, or names what does not exist or
      cannot be prepared; K is not in [1, 94].
  """
  selection = selection or Selection()
  kind, colon, argument = spec.partition(':')
  if kind == 'python_stdlib' and bool(colon) == bool(argument):
    return _python_stdlib(argument, selection, cache_dir)
  if kind == 'files' and argument:
    return _files(argument, selection)
  if kind == 'tfds' and argument:
    return _tfds(argument, selection)
  if kind == 'cipher' and argument:
    return _cipher(argument, selection, cache_dir)
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

  def documents(split):
    made = tfds_reader.own_builder(folder, builder)
    tfds_reader.check_feature(made, selection.text_feature, 'text_feature')
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
  builder = tfds_reader.prepared_builder(name)
  tfds_reader.check_feature(builder, selection.text_feature, 'text_feature')
  for split in selection.splits:  # now, though the tokens may be in the cache
    tfds_reader.open_split(builder, split)
  return Source(
    f'tfds:{builder.info.full_name}',
    f'{tfds_reader.identity(builder)} {selection}',
    lambda split: _texts(builder, selection, split),
  )


def _cipher(argument: str, selection: Selection, cache_dir: str) -> Source:
  key = cipher.parse(argument)
  text = open_source(key.text, selection, cache_dir)
  marked = ', marked,' * key.marked
  return Source(
    f'synthetic: {key.num_domains} ciphers{marked} of {text.name}',
    f'cipher {cipher.FORMAT} {key.num_domains} {key.marked} {cipher.PIECE} '
    f'{text.identity}',
    lambda split: cipher.documents(text.documents(split), key),
  )


def _texts(
  builder: tfds_reader.Builder, selection: Selection, split: str
) -> Iterator[str]:
  own = selection.splits[SPLITS.index(split)]
  for (text,) in tfds_reader.texts(builder, own, [selection.text_feature]):
    yield text
