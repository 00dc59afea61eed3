"""Questions of a TFDS dataset."""

import dataclasses
from collections.abc import Sequence

from moe_jax.data.choices.contract import (
  ChoiceSourceOptions,
  Item,
  ItemSource,
  check_item,
)
from moe_jax.data.sources import tfds_reader
from moe_jax.data.sources.contract import Selection
from moe_jax.options import NOT_EMPTY, option


@dataclasses.dataclass(frozen=True)
class ChoiceTfdsSource(ChoiceSourceOptions):
  """Features of a TFDS dataset, in the folder that `TfdsSource` names."""

  name: str = option(
    dataclasses.MISSING, 'Name of the TFDS dataset of questions.', NOT_EMPTY
  )
  prompt_feature: str = option(
    'prompt', 'TFDS feature with the prompt of a question.'
  )
  answers_feature: str = option(
    'answers',
    'TFDS feature with all answers of a question, or several features with one '
    "answer each, separated by commas: 'sol1,sol2'.",
  )
  label_feature: str = option(
    'label',
    'TFDS feature with the index of the right answer; true is 1, false is 0.',
  )

  def items(self, selection: Selection = Selection()) -> ItemSource:
    """An item for each example of the dataset.

    Raises:
      ValueError: The dataset, a feature or a split is missing.
    """
    builder = tfds_reader.prepared_builder(self.name)
    answers = self.answers_feature.split(',')
    features = (self.prompt_feature, self.label_feature, *answers)
    options = ('prompt_feature', 'label_feature')
    options += ('answers_feature',) * len(answers)
    for feature, name in zip(features, options, strict=True):
      tfds_reader.check_feature(builder, feature, name)
    for split in selection.splits:
      tfds_reader.open_split(builder, split)
    return ItemSource(
      f'tfds:{builder.info.full_name}',
      lambda split: _TfdsItems(builder, selection.name_of(split), features),
    )


class _TfdsItems(Sequence):
  """A sequence of items, each read when it is accessed."""

  def __init__(self, builder, split: str, features: Sequence[str]):
    self._builder, self._features = builder, features
    self._examples = tfds_reader.open_split(builder, split)

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> Item:
    if not 0 <= index < len(self):  # iteration ends at an IndexError
      raise IndexError(f'item {index} of {len(self)}')
    where = f'example {index} of {self._builder.name!r}'
    prompt, label, *answers = tfds_reader.values(
      self._builder, self._examples[index], self._features
    )
    if len(answers) == 1:
      answers = list(answers[0])
    prompt, *answers = [
      tfds_reader.as_text(text, where) for text in (prompt, *answers)
    ]
    return check_item(prompt, answers, int(label), where)
