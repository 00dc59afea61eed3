"""Where pairs come from: docstrings, translations, TFDS, keys and values.

A source streams the pairs of two splits and has an identity that changes with
their content. Not here: tokens (`data/store.py`).
"""

import dataclasses
import platform
from collections.abc import Callable, Iterator

from moe_jax.config import unknown
from moe_jax.data.sources import (
  django_gettext,
  kv_recall,
  python_docstrings,
  python_stdlib,
  tfds_reader,
)
from moe_jax.data.sources.texts import SPLITS
from moe_jax.data.store import Digest, cache_root

KINDS = ('python_stdlib_docstrings', 'python_stdlib_docstrings:<modules>')
KINDS += ('django_gettext', 'django_gettext:<languages>', 'tfds:<name>')
KINDS += ('kv_recall:<N>',)

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class PairSource:
  """Pairs in two splits.

  Attributes:
    name: For people.
    identity: Equal only for equal pairs in equal order; no pass over the
      pairs of a TFDS dataset is made for it.
    pairs: `pairs('train')` and `pairs('validation')` stream (inputs, targets),
      each time anew and in the same order.
  """

  name: str
  identity: str
  pairs: Callable[[str], Iterator[Pair]]


@dataclasses.dataclass(frozen=True)
class PairSelection:
  """Which part of a source is wanted, and how.

  Attributes:
    splits: The source's own names of our train and validation split; in a
      TFDS dataset any split expression, such as 'train[90%:]'.
    input_feature: The TFDS feature with the inputs; 'translation/de' is one
      within another.
    target_feature: The TFDS feature with the targets.
    input_prefix: Stands before all inputs, such as 'summarize: '.
  """

  splits: tuple[str, str] = SPLITS
  input_feature: str = 'inputs'
  target_feature: str = 'targets'
  input_prefix: str = ''


def open_pairs(
  spec: str, selection: PairSelection | None = None, cache_dir: str = ''
) -> PairSource:
  """The source that `spec` names.

  - `python_stdlib_docstrings`: functions of the running Python's standard
    library without their docstrings, and the docstrings; prepared by TFDS
    under `cache_dir`. `python_stdlib_docstrings:json,email` is a part of it.
  - `django_gettext:de,fr`: messages of django's interface and their
    translations; all languages if none is named. Inputs say into which:
    `de: Save`. A message is in the same split in every language.
  - `tfds:<name>`: two features of a TFDS dataset, which has to be where and as
    `texts.open_source` says.
  - `kv_recall:<N>`: synthetic. N random keys and their values, to be learned
    by heart: the same in both splits, in another order.

  Raises:
    ValueError: `spec` is of no such kind, or names what does not exist or
      cannot be prepared; the package django is missing; N is out of range.
  """
  selection = selection or PairSelection()
  kind, colon, argument = spec.partition(':')
  if kind == 'python_stdlib_docstrings' and bool(colon) == bool(argument):
    source = _docstrings(argument, selection, cache_dir)
  elif kind == 'django_gettext' and bool(colon) == bool(argument):
    source = _django_gettext(argument, selection)
  elif kind == 'tfds' and argument:
    source = _tfds(argument, selection)
  elif kind == 'kv_recall' and argument:
    source = _kv_recall(argument, selection)
  else:
    raise unknown('source of pairs', spec, KINDS)
  prefix = selection.input_prefix
  return dataclasses.replace(
    source,
    pairs=lambda split: ((prefix + i, t) for i, t in source.pairs(split)),
  )


def _docstrings(
  argument: str, selection: PairSelection, cache_dir: str
) -> PairSource:
  modules = argument.split(',') if argument else python_docstrings.MODULES
  digest = python_stdlib.content_digest(python_stdlib.source_files(modules))
  name = f'python_stdlib_docstrings-{digest[:16]}'
  folder = cache_root(cache_dir) / 'tfds' / name

  def builder(data_dir):
    return python_docstrings.PythonStdlibDocstrings(
      modules=modules, data_dir=data_dir, file_format='array_record'
    )

  def pairs(split):
    made = tfds_reader.own_builder(folder, builder)
    return _of_features(made, selection, split)

  part = f':{argument}' if argument else ''
  version = python_docstrings.PythonStdlibDocstrings.VERSION
  return PairSource(
    f'python_stdlib_docstrings{part} of Python {platform.python_version()}',
    f'docstrings {version} {digest} {selection}',
    pairs,
  )


def _django_gettext(argument: str, selection: PairSelection) -> PairSource:
  _check_splits('django_gettext', selection)
  languages = argument.split(',') if argument else []
  found = django_gettext.pairs(languages, django_gettext.locate())
  digest = Digest()
  for pair in found:
    digest.text(pair.inputs.encode())
    digest.text(pair.translation.encode())

  def pairs(split):
    own = selection.splits[SPLITS.index(split)]
    return ((p.inputs, p.translation) for p in found if p.split == own)

  part = f':{argument}' if argument else ''
  count = len({pair.language for pair in found})
  return PairSource(
    f'django_gettext{part} of django {django_gettext.version()} '
    f'({count} languages)',
    f'gettext {digest.hexdigest()} {selection}',
    pairs,
  )


def _kv_recall(argument: str, selection: PairSelection) -> PairSource:
  count = kv_recall.parse(argument)
  _check_splits('kv_recall', selection)

  def pairs(split):
    return iter(kv_recall.pairs(count, selection.splits[SPLITS.index(split)]))

  return PairSource(
    f'synthetic: {count} random keys and values, the same in both splits',
    f'kv_recall {kv_recall.FORMAT} {count} {selection}',
    pairs,
  )


def _check_splits(kind: str, selection: PairSelection) -> None:
  for split in selection.splits:
    if split not in SPLITS:
      raise unknown(f'split of {kind}', split, SPLITS)


def _tfds(name: str, selection: PairSelection) -> PairSource:
  builder = tfds_reader.prepared_builder(name)
  _check_features(builder, selection)
  for split in selection.splits:  # now, though the tokens may be in the cache
    tfds_reader.open_split(builder, split)
  return PairSource(
    f'tfds:{builder.info.full_name} '
    f'({selection.input_feature} to {selection.target_feature})',
    f'{tfds_reader.identity(builder)} {selection}',
    lambda split: _of_features(builder, selection, split),
  )


def _of_features(
  builder: tfds_reader.Builder, selection: PairSelection, split: str
) -> Iterator[Pair]:
  _check_features(builder, selection)
  own = selection.splits[SPLITS.index(split)]
  features = selection.input_feature, selection.target_feature
  return tfds_reader.texts(builder, own, features)


def _check_features(
  builder: tfds_reader.Builder, selection: PairSelection
) -> None:
  for option in ('input_feature', 'target_feature'):
    tfds_reader.check_feature(builder, getattr(selection, option), option)
