"""Datasets of TFDS: texts, or pairs of texts."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

from moe_jax.data.sources import tfds_reader
from moe_jax.data.sources.contract import (
  Pairs,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.options import NOT_EMPTY, option


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
