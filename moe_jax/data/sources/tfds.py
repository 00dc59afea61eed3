"""Datasets of TFDS: texts, pairs of texts, or images with a class each.

Not here: how a dataset is prepared and read (`tfds_reader.py`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

from tensorflow_datasets.core import features as features_lib

from moe_jax.data.sources import digits, tfds_reader
from moe_jax.data.sources.contract import (
  SPLITS,
  Pairs,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.errors import InputError
from moe_jax.options import NOT_EMPTY, at_least, option


@dataclasses.dataclass(frozen=True)
class TfdsSource(SourceOptions):
  """A TFDS dataset in array_record format.

  It is read from $TFDS_DATA_DIR or ~/tensorflow_datasets, and prepared there
  first if that is possible without TensorFlow.
  """

  only_in: ClassVar[Mapping[str, str]] = {
    'text_feature': 'texts',
    'input_feature': 'pairs',
    'target_feature': 'pairs',
    'image_feature': 'classes',
    'label_feature': 'classes',
    'max_shift': 'classes',
  }

  name: str = option(
    dataclasses.MISSING,
    'Name of the TFDS dataset, with its configuration and version if it has '
    "several: 'wmt14_translate/de-en'.",
    NOT_EMPTY,
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
  image_feature: str = option(
    'image',
    'TFDS feature with the grey images, for a task that reads classes.',
  )
  label_feature: str = option(
    'label', 'TFDS feature with the class, for a task that reads classes.'
  )
  max_shift: int = option(
    4,
    'Largest number of pixels by which an image is moved in each direction '
    'whenever it is drawn; 0 does not move images.',
    at_least(0),
  )

  def texts(self, selection: Selection = Selection()) -> Texts:
    """The texts of one feature.

    Raises:
      ValueError: The dataset, the feature or a split is missing.
    """
    builder = self._open(selection, ['text_feature'])
    return Texts(
      f'tfds:{builder.info.full_name}',
      f'{tfds_reader.identity(builder)} texts {selection.splits} '
      f'{self.text_feature!r}',
      lambda split: (
        text
        for (text,) in self._read(
          builder, selection.name_of(split), ['text_feature']
        )
      ),
    )

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """The texts of two features.

    Raises:
      ValueError: The dataset, a feature or a split is missing.
    """
    options = ['input_feature', 'target_feature']
    builder = self._open(selection, options)
    features = self.input_feature, self.target_feature
    return Pairs(
      f'tfds:{builder.info.full_name} ({" to ".join(features)})',
      f'{tfds_reader.identity(builder)} pairs {selection.splits} {features}',
      lambda split: cast(
        Any, self._read(builder, selection.name_of(split), options)
      ),
    )

  def classes(self, selection: Selection = Selection()) -> digits.Digits:
    """Grey images of one size, which are moved by up to `max_shift` pixels.

    The 28x28 of MNIST become 36x36.

    Raises:
      ValueError: The dataset, a feature or a split is missing, or the images
        are not grey and of one size.
    """
    builder = self._open(selection, ['image_feature', 'label_feature'])
    shape = tfds_reader.feature_of(builder, self.image_feature).shape
    if len(shape) != 3 or None in shape or shape[-1] != 1:
      raise InputError(
        f'images of TFDS dataset {self.name!r} are {shape}; they are to be '
        'grey and of one size'
      )
    label = tfds_reader.feature_of(builder, self.label_feature)
    if not isinstance(label, features_lib.ClassLabel):
      raise InputError(
        f'label_feature={self.label_feature!r} of TFDS dataset {self.name!r} '
        f'is a {type(label).__name__}, not a ClassLabel'
      )
    features = self.image_feature, self.label_feature
    splits = {
      split: tfds_reader.images(builder, selection.name_of(split), *features)
      for split in SPLITS
    }
    canvas = shape[0] + 2 * self.max_shift, shape[1] + 2 * self.max_shift
    return digits.Digits(
      f'tfds:{builder.info.full_name}, moved by up to {self.max_shift} pixels',
      splits,
      tuple(label.names),
      canvas,
    )

  def _open(
    self, selection: Selection, options: Sequence[str]
  ) -> tfds_reader.Builder:
    """The builder, after checks of the features and splits."""
    builder = tfds_reader.prepared_builder(self.name)
    for option_name in options:
      feature = getattr(self, option_name)
      tfds_reader.check_feature(builder, feature, option_name)
    for split in selection.splits:
      tfds_reader.open_split(builder, split)
    return builder

  def _read(
    self, builder: tfds_reader.Builder, split: str, options: Sequence[str]
  ) -> Iterator[tuple[str, ...]]:
    features = [getattr(self, option_name) for option_name in options]
    return tfds_reader.texts(builder, split, features)
