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
  """Features of a TFDS dataset, which stands where `TfdsSource` says."""

  name: str = option(dataclasses.MISSING, 'Name of the dataset.', NOT_EMPTY)
  prompt_feature: str = option('prompt', 'Feature with the prompt.')
  answers_feature: str = option(
    'answers',
    'Feature with all answers, or several with one answer each, separated by '
    "commas: 'sol1,sol2'.",
  )
  label_feature: str = option(
    'label', 'Feature with the index of the right answer, or a truth value.'
  )

  def items(self, selection: Selection = Selection()) -> ItemSource:
    """An item an example.

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
      lambda split: _TfdsItems(builder, selection.own(split), features),
    )


class _TfdsItems(Sequence):
  """Reads an example when it is asked for."""

  def __init__(self, builder, split: str, features: Sequence[str]):
    self._builder, self._features = builder, features
    self._examples = tfds_reader.open_split(builder, split)

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> Item:
    if not 0 <= index < len(self):  # else a loop over it would not end
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
