"""Sources of questions with several answers, of which one is right.

To add a source, write its `ChoiceSourceOptions` here and list it at the end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import grain

from moe_jax.config import Kinds, Options, option
from moe_jax.data.contracts import Selection
from moe_jax.data.document_files import PATTERN_OPTION, json_lines
from moe_jax.data.plain_files import check_text
from moe_jax.data.sources import tfds
from moe_jax.data.sources.python_stdlib import MODULES_OPTION, DocstringsSource
from moe_jax.data.urls import matching
from moe_jax.errors import InputError

NUM_ANSWERS = 4  # of a question about a docstring


class Item(NamedTuple):
  """A question with several answers, of which one is right.

  Attributes:
    prompt: Text that the model is given; not empty.
    answers: Two or more answers to choose from, none empty, all different.
    label: Index of the right answer.
  """

  prompt: str
  answers: tuple[str, ...]
  label: int


Items = Sequence[Item]  # which may be read one by one


class ChoiceSourceOptions(Options):
  """Contract of the options of a source of questions with several answers.

  Attributes:
    has_train_split: Whether 'train' and 'validation' have different items, so
      that examples from 'train' do not give away the answers.
  """

  has_train_split: ClassVar[bool] = True

  def items(self, split: str, selection: Selection = Selection()) -> Items:
    """The questions of a split, 'train' or 'validation'.

    Questions of 'validation' are asked; questions of 'train' serve as examples
    that are put before a question.

    Raises:
      ValueError: The data is missing or bad.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SameSource(ChoiceSourceOptions):
  """Stands, as the source of examples, for the source of the questions itself.

  The evaluation of kind 'choice' then takes examples from its split 'train'.
  """


def check_item(prompt: Any, answers: Any, label: Any, where: str) -> Item:
  """Checks the fields of an item, which messages call `where`; returns it.

  Raises:
    ValueError: A field is missing, empty or out of range, or two answers are
      equal.
  """
  check_text(prompt, f'{where}: prompt')
  if not isinstance(answers, list | tuple):
    raise InputError(f'{where}: answers={answers!r} are no list of texts')
  for answer in answers:
    check_text(answer, f'{where}: answers')
  if len(answers) < 2 or len(set(answers)) < len(answers):
    raise InputError(f'{where}: {answers=} are to be two or more, different')
  if type(label) is not int or not 0 <= label < len(answers):
    raise InputError(f'{where}: {label=} is no index of {len(answers)} answers')
  return Item(prompt, tuple(answers), label)


@dataclasses.dataclass(frozen=True)
class ChoiceFilesSource(ChoiceSourceOptions):
  """Questions in lines of JSON: `prompt`, a list `answers`, an index `label`.

  Both splits have all lines, so examples before a question have to come from
  another source; otherwise the model would be given the answers.
  """

  has_train_split = False

  pattern: str = PATTERN_OPTION

  def items(self, split: str, selection: Selection = Selection()) -> Items:
    """An item for each line that is not empty.

    Raises:
      ValueError: No file matches, all files are empty, or a line is no item.
    """
    paths = matching(self.pattern)
    items, keys = [], set(Item._fields)
    for where, _, value in json_lines(paths):
      if not isinstance(value, dict) or not keys <= value.keys():
        raise InputError(f'{where} is no object with {sorted(keys)}')
      items.append(check_item(**{key: value[key] for key in keys}, where=where))
    if not items:
      raise InputError(f'the {len(paths)} files of {self.pattern!r} are empty')
    return items


@dataclasses.dataclass(frozen=True)
class ChoiceTfdsSource(ChoiceSourceOptions):
  """Questions from a TFDS dataset in $TFDS_DATA_DIR, prepared if needed."""

  name: str = option(
    dataclasses.MISSING, 'Name of the TFDS dataset of questions.', required=True
  )
  prompt_feature: str = option(
    'prompt', 'Feature with the prompt of a question.'
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

  def items(self, split: str, selection: Selection = Selection()) -> Items:
    """An item for each example of the dataset.

    Raises:
      ValueError: The dataset, a feature or a split is missing.
    """
    answer_features = self.answers_feature.split(',')
    options = {
      self.prompt_feature: 'prompt_feature',
      self.label_feature: 'label_feature',
      **dict.fromkeys(answer_features, 'answers_feature'),
    }
    builder = tfds.checked_builder(self.name, options, selection)

    def item(index: int, example: Any) -> Item:
      where = f'example {index} of {builder.name!r}'
      answers = [tfds.value_of(example, name) for name in answer_features]
      if len(answers) == 1:
        answers = answers[0]
      prompt = tfds.value_of(example, self.prompt_feature)
      texts = [tfds.as_text(text, where) for text in (prompt, *answers)]
      label = int(tfds.value_of(example, self.label_feature))
      return check_item(texts[0], texts[1:], label, where)

    examples = tfds.open_split(builder, selection.name_of(split))
    # Each item is read when it is accessed.
    return cast(Any, grain.MapDataset.source(examples).map_with_index(item))


@dataclasses.dataclass(frozen=True)
class DocstringChoiceSource(ChoiceSourceOptions):
  """Questions about a function: which of four lines begins its docstring."""

  modules: str = MODULES_OPTION

  def items(self, split: str, selection: Selection = Selection()) -> Items:
    """An item for each function with a docstring; all answers are of one split.

    Raises:
      ValueError: A module is not of the standard library.
    """
    pairs = DocstringsSource(self.modules).pairs(selection).pairs(split)
    first_lines = ((f, d.split('\n')[0].strip()) for f, d in pairs)
    return with_distractors(list(filter(all, first_lines)))


def with_distractors(pairs: Sequence[tuple[str, str]]) -> list[Item]:
  """An item for each (prompt, answer), with wrong answers from other pairs.

  With P pairs, the j-th wrong answer of pair i is the answer of pair
  (i + j P / 4) mod P, rounded down, or of the next pair whose answer the item
  does not have yet; after the last pair comes the first. The index of the right
  answer is i mod 4.

  Raises:
    ValueError: There are fewer than four different answers.
  """
  P = len(pairs)
  if len({answer for _, answer in pairs}) < NUM_ANSWERS:
    raise InputError(f'{P} pairs have fewer than {NUM_ANSWERS} answers')
  items = []
  for i, (prompt, right) in enumerate(pairs):
    answers = [right]
    for j in range(1, NUM_ANSWERS):
      at = i + j * P // NUM_ANSWERS
      while pairs[at % P][1] in answers:
        at += 1
      answers.append(pairs[at % P][1])
    label = i % NUM_ANSWERS
    answers.insert(label, answers.pop(0))
    items.append(Item(prompt, tuple(answers), label))
  return items


CHOICE_SOURCES = Kinds(
  'source of choices',
  ChoiceSourceOptions,
  {
    'docstring_choice': DocstringChoiceSource,
    'files': ChoiceFilesSource,
    'tfds': ChoiceTfdsSource,
  },
)
# Sources of the examples that are put before a question.
SHOTS_SOURCES = Kinds(
  'source of examples',
  ChoiceSourceOptions,
  {'same': SameSource, **CHOICE_SOURCES.builtin},
)
