"""Datasets of TFDS: how they are prepared, and their texts and pairs."""

import dataclasses
import functools
import hashlib
import operator
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import tensorflow_datasets as tfds

from moe_jax.config import option, unknown
from moe_jax.data.cache_folders import check_may_prepare, locked
from moe_jax.data.contracts import Pairs, Selection, SourceOptions, Texts
from moe_jax.data.plain_files import decoded, first_line
from moe_jax.errors import InputError

Builder = tfds.core.DatasetBuilder


def prepared_builder(name: str) -> Builder:
  """The builder of a dataset in $TFDS_DATA_DIR, or ~/tensorflow_datasets.

  A dataset that is not there yet is downloaded and prepared.

  Raises:
    ValueError: The dataset is unknown, or cannot be prepared here.
    NotPreparedError: The dataset is not there, within `reading_only`.
  """
  data_dir = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  data_dir = os.path.expanduser(data_dir)
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    if not os.path.exists(builder.data_dir):
      check_may_prepare(f'the TFDS dataset {name!r} in {data_dir}')
    if '://' not in data_dir:  # a lock file needs a local folder
      pathlib.Path(data_dir).mkdir(parents=True, exist_ok=True)
    with locked(pathlib.Path(data_dir) / name.replace('/', '.')):
      builder.download_and_prepare()
  except InputError:  # of `check_may_prepare`
    raise
  except Exception as error:  # builders and downloads raise any exception
    raise InputError(
      f'TFDS dataset {name!r} could not be prepared here, where '
      f'{_names(data_dir)} are ({type(error).__name__}: {first_line(error)}); '
      'prepare it on a machine with TensorFlow, by tfds.builder('
      f"{name!r}, file_format='array_record').download_and_prepare(), and set "
      f'TFDS_DATA_DIR (now {data_dir!r}) to the folder it is in'
    ) from error
  return builder


def identity(builder: Builder) -> str:
  """Text that changes with the dataset, made without reading its examples."""
  digest = hashlib.sha256(builder.info.as_json.encode())
  for split in builder.info.splits.values():
    for path in map(os.fspath, split.filepaths):
      # For a path in a bucket only its name counts.
      changed = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
      digest.update(f'{path} {changed}\n'.encode())
  return digest.hexdigest()


def open_split(builder: Builder, split: str) -> Sequence[Any]:
  """The examples of a split, or of an expression such as 'train[:90%]'.

  Raises:
    ValueError: There is no such split, or the format has no random access.
  """
  try:
    return cast(Any, builder).as_data_source(split=split)
  except NotImplementedError as error:  # the format has no random access
    raise InputError(f'TFDS dataset {builder.name!r}: {error}') from error
  except ValueError as error:
    raise InputError(
      f'split {split!r} of {builder.name!r} cannot be read; have '
      f'{sorted(builder.info.splits)} and parts of them ({error})'
    ) from error


def checked_builder(
  name: str, options: Mapping[str, str], selection: Selection
) -> Builder:
  """The prepared builder of a dataset that has these features and splits.

  Args:
    name: Name of the dataset.
    options: For each feature the name of its option, for messages;
      'translation/de' is the feature 'de' within 'translation'.
    selection: The splits.

  Raises:
    ValueError: The dataset, a feature or a split is unknown, or the dataset
      cannot be prepared here.
  """
  builder = prepared_builder(name)
  names = list(_names_of(builder.info.features))
  for feature, option_name in options.items():
    if feature not in names:
      raise unknown(f'{option_name} of {builder.name!r}', feature, names)
  for split in selection.splits:
    open_split(builder, split)
  return builder


def value_of(example: Any, feature: str) -> Any:
  """The value of a feature, such as 'translation/de', in an example."""
  return functools.reduce(operator.getitem, feature.split('/'), example)


def as_text(value: Any, where: str) -> str:
  """A feature's value, which messages call `where`, as text.

  Raises:
    ValueError: The value is neither a text nor bytes of UTF-8.
  """
  if isinstance(value, bytes):
    return decoded(value, where)
  if not isinstance(value, str):
    raise InputError(f'{where} has type {type(value).__name__}, not text')
  return value


def _names_of(features: Any, outer: str = '') -> Iterator[str]:
  """The keys that lead to each feature, joined to `outer`: 'translation/de'."""
  for key, feature in features.items():
    if isinstance(feature, tfds.features.FeaturesDict):
      yield from _names_of(feature, f'{outer}{key}/')
    else:
      yield f'{outer}{key}'


def _names(data_dir: str) -> list[str]:
  """Names of the datasets in `data_dir`."""
  root, file = pathlib.Path(data_dir), 'dataset_info.json'
  # A dataset has a folder for each version, within a folder for each
  # configuration if it has several.
  paths = [*root.glob(f'*/*/{file}'), *root.glob(f'*/*/*/{file}')]
  return sorted({path.relative_to(root).parts[0] for path in paths})


@dataclasses.dataclass(frozen=True)
class TfdsSource(SourceOptions):
  """A TFDS dataset in array_record format.

  The dataset is read from $TFDS_DATA_DIR or ~/tensorflow_datasets, and is
  prepared there first if that is possible without TensorFlow.
  """

  only_in: ClassVar[Mapping[str, str]] = dict(
    text_feature='texts', input_feature='pairs', target_feature='pairs'
  )

  name: str = option(
    dataclasses.MISSING,
    'Name of the TFDS dataset, with its configuration and version if it has '
    "several: 'wmt14_translate/de-en'.",
    required=True,
  )
  text_feature: str = option(
    'text', 'TFDS feature with the text, for a task that reads texts.'
  )
  input_feature: str = option(
    'inputs',
    'TFDS feature with the inputs, for a task that reads pairs; '
    "'translation/de' is the feature 'de' within 'translation'.",
  )
  target_feature: str = option(
    'targets', 'TFDS feature with the targets, for a task that reads pairs.'
  )

  def texts(self, selection: Selection = Selection()) -> Texts:
    """The texts of one feature.

    Raises:
      ValueError: The dataset, the feature or a split is missing.
    """
    builder, read = self._open(selection, 'text_feature')
    return Texts(
      f'tfds:{builder.info.full_name}',
      f'{identity(builder)} texts {selection.splits} {self.text_feature!r}',
      lambda split: (text for (text,) in read(split)),
    )

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """Pairs of the texts of two features.

    Raises:
      ValueError: The dataset, a feature or a split is missing.
    """
    builder, read = self._open(selection, 'input_feature', 'target_feature')
    features = self.input_feature, self.target_feature
    return Pairs(
      f'tfds:{builder.info.full_name} ({" to ".join(features)})',
      f'{identity(builder)} pairs {selection.splits} {features}',
      cast(Any, read),
    )

  def _open(
    self, selection: Selection, *options: str
  ) -> tuple[Builder, Callable[[str], Iterator[tuple[str, ...]]]]:
    """The builder, and a function from a split to texts of its examples.

    The function takes 'train' or 'validation'. `options` are names of options,
    whose values are the features that give the texts. Features and splits are
    checked to exist.
    """
    features = [getattr(self, name) for name in options]
    names = dict(zip(features, options))
    builder = checked_builder(self.name, names, selection)

    def read(split: str) -> Iterator[tuple[str, ...]]:
      examples = open_split(builder, selection.name_of(split))
      for i, example in enumerate(examples):
        yield tuple(
          as_text(value_of(example, f), f'{f!r} {i} of {builder.name!r}')
          for f in features
        )

    return builder, read
