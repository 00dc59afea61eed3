"""The contract of sources of questions with several answers, one right."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from moe_jax.data.sources.contract import Selection
from moe_jax.errors import InputError
from moe_jax.options import Options


class Item(NamedTuple):
  """A question.

  Attributes:
    prompt: Text that the model is given; not empty.
    answers: Two or more answers to choose from, none empty, all different.
    label: Index of the right answer.
  """

  prompt: str
  answers: tuple[str, ...]
  label: int


@dataclasses.dataclass(frozen=True)
class ItemSource:
  """Items of two splits.

  Attributes:
    name: Description of the source for messages.
    items: Function from a split to its items, which may be read one by one.
      Those of 'train' serve as examples, those of 'validation' are asked.
  """

  name: str
  items: Callable[[str], Sequence[Item]]


class ChoiceSourceOptions(Options):
  """Contract of a source of questions.

  Attributes:
    has_train_split: Whether 'train' and 'validation' have different items, so
      that examples do not give away the answers.
  """

  has_train_split: ClassVar[bool] = True

  def items(self, selection: Selection = Selection()) -> ItemSource:
    """The items of both splits.

    Raises:
      ValueError: The data is missing or bad.
    """
    raise NotImplementedError

  def instead_of(self, judged: 'ChoiceSourceOptions') -> 'ChoiceSourceOptions':
    """The source of examples, given the source of the items that are asked."""
    del judged
    return self


@dataclasses.dataclass(frozen=True)
class SameSource(ChoiceSourceOptions):
  """Examples from the train split of the source of the items that are asked."""

  def instead_of(self, judged: ChoiceSourceOptions) -> ChoiceSourceOptions:
    """The source of the items that are asked."""
    return judged


def check_item(prompt: Any, answers: Any, label: Any, where: str) -> Item:
  """The item of these fields.

  Raises:
    ValueError: A field is missing, empty or out of range, or two answers are
      equal.
  """
  listed = isinstance(answers, list | tuple)
  texts: list[Any] = [prompt, *answers] if listed else [None]
  if not all(isinstance(text, str) and text for text in texts):
    raise InputError(
      f'{where}: prompt={prompt!r} is to be a text and answers={answers!r} a '
      'list of texts, none empty'
    )
  if len(answers) < 2 or len(set(answers)) < len(answers):
    raise InputError(
      f'{where}: answers={answers!r} are to be two or more, and different'
    )
  for text in texts:
    if any('\ud800' <= character <= '\udfff' for character in text):
      raise InputError(f'{where}: {text!r} has a half of a character')
  if type(label) is not int or not 0 <= label < len(answers):
    raise InputError(
      f'{where}: label={label!r} is no index of {len(answers)} answers'
    )
  return Item(prompt, tuple(answers), int(label))
