"""Questions with several answers of which one is right, and their examples.

A source has items to be judged and others to be shown before them. Not here:
how a model is asked (`moe_jax.evaluation.choice`).
"""

import dataclasses
import glob
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_jax.config import unknown
from moe_jax.data.sources import pairs as pair_sources
from moe_jax.data.sources import tfds_reader
from moe_jax.data.sources.texts import SPLITS

KINDS = ('docstring_choice', 'docstring_choice:<modules>', 'files:<glob>')
KINDS += ('tfds:<name>',)
NUM_ANSWERS = 4  # of docstring_choice


class Item(NamedTuple):
  """A question.

  Attributes:
    prompt: What the model is given; not empty.
    answers: At least two, none empty, all different.
    label: The index of the right one.
  """

  prompt: str
  answers: tuple[str, ...]
  label: int


@dataclasses.dataclass(frozen=True)
class ItemSource:
  """Items of two splits.

  Attributes:
    name: For people.
    items: `items('train')` are to be shown, `items('validation')` to be judged;
      either may be read item by item.
  """

  name: str
  items: Callable[[str], Sequence[Item]]


@dataclasses.dataclass(frozen=True)
class ItemSelection:
  """Which part of a source is wanted; see `pair_sources.PairSelection`.

  Attributes:
    splits: The source's own names of our train and validation split.
    prompt_feature: The TFDS feature with the prompt.
    answers_feature: The one with all answers, or several by commas with one
      each: 'sol1,sol2'.
    label_feature: The one with the index of the right answer, or a truth value.
  """

  splits: tuple[str, str] = SPLITS
  prompt_feature: str = 'prompt'
  answers_feature: str = 'answers'
  label_feature: str = 'label'


def open_items(
  spec: str, selection: ItemSelection | None = None, cache_dir: str = ''
) -> ItemSource:
  """The source that `spec` names.

  - `docstring_choice`: which of four docstrings' first lines is of a function
    of the running Python's standard library; the wrong ones are of functions
    far away in the same split. `docstring_choice:json,email` is a part of it.
  - `files:<glob>`: lines of JSON with `prompt`, `answers` (a list) and `label`
    (an index). Both splits are all lines: what is shown to a model has to be
    another source's, else it would be told the answers.
  - `tfds:<name>`: features of a TFDS dataset, which has to be where and as
    `texts.open_source` says.

  Raises:
    ValueError: `spec` is of no such kind, or names what does not exist or
      cannot be prepared; a line of a file is no item.
  """
  selection = selection or ItemSelection()
  kind, colon, argument = spec.partition(':')
  if kind == 'docstring_choice' and bool(colon) == bool(argument):
    return _docstrings(argument, selection, cache_dir)
  if kind == 'files' and argument:
    found = _files(argument)
    return ItemSource(f'{spec} ({len(found)} items)', lambda split: found)
  if kind == 'tfds' and argument:
    return _tfds(argument, selection)
  raise unknown('source of choices', spec, KINDS)


def check_item(prompt: Any, answers: Any, label: Any, where: str) -> Item:
  """The item, if it is one.

  Raises:
    ValueError: Something is missing, empty, alike or out of range.
  """
  texts = [prompt, *answers] if isinstance(answers, list | tuple) else [None]
  if not all(isinstance(text, str) and text for text in texts):
    raise ValueError(
      f'{where}: prompt={prompt!r} is to be a text and answers={answers!r} a '
      'list of texts, none empty'
    )
  if len(answers) < 2 or len(set(answers)) < len(answers):
    raise ValueError(
      f'{where}: answers={answers!r} are to be two or more, and different'
    )
  if not isinstance(label, int) or not 0 <= label < len(answers):
    raise ValueError(
      f'{where}: label={label!r} is no index of {len(answers)} answers'
    )
  return Item(prompt, tuple(answers), int(label))


def _docstrings(
  argument: str, selection: ItemSelection, cache_dir: str
) -> ItemSource:
  source = pair_sources.open_pairs(
    'python_stdlib_docstrings' + f':{argument}' * bool(argument),
    pair_sources.PairSelection(selection.splits),
    cache_dir,
  )

  def items(split):
    pairs = [
      (function, docstring.split('\n')[0].strip())
      for function, docstring in source.pairs(split)
    ]
    return with_distractors([pair for pair in pairs if all(pair)])

  return ItemSource(f'first lines of {source.name}', items)


def with_distractors(pairs: Sequence[tuple[str, str]]) -> list[Item]:
  """An item a pair; the wrong answers are those of other pairs.

  Of P pairs, the j-th wrong answer to pair i is that of pair i + j P / 4, or of
  the next one that says something new. The right answer moves on by one place
  each time.

  Raises:
    ValueError: There are fewer than four different answers.
  """
  P = len(pairs)
  if len({answer for _, answer in pairs}) < NUM_ANSWERS:
    raise ValueError(f'{P} pairs have fewer than {NUM_ANSWERS} answers')
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


def _files(pattern: str) -> list[Item]:
  found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
  paths = [pathlib.Path(path) for path in found if os.path.isfile(path)]
  if not paths:
    raise ValueError(f'no file matches {pattern!r} in {os.getcwd()}')
  items = []
  for path in paths:
    lines = path.read_text(encoding='utf-8').split('\n')
    for number, line in enumerate(lines, 1):
      if line.strip():
        items.append(_of_line(line, f'{path}, line {number}'))
  if not items:
    raise ValueError(f'the {len(paths)} files of {pattern!r} are empty')
  return items


def _of_line(line: str, where: str) -> Item:
  try:
    value = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{where} is no JSON: {error}') from None
  keys = set(Item._fields)
  if not isinstance(value, dict) or not keys <= value.keys():
    raise ValueError(f'{where} is no object with {sorted(keys)}')
  return check_item(*(value[key] for key in Item._fields), where)


def _tfds(name: str, selection: ItemSelection) -> ItemSource:
  builder = tfds_reader.prepared_builder(name)
  answers = selection.answers_feature.split(',')
  features = (selection.prompt_feature, selection.label_feature, *answers)
  options = ('prompt_feature', 'label_feature')
  options += ('answers_feature',) * len(answers)
  for feature, option in zip(features, options):
    tfds_reader.check_feature(builder, feature, option)
  for split in selection.splits:
    tfds_reader.open_split(builder, split)
  return ItemSource(
    f'tfds:{builder.info.full_name}',
    lambda split: _TfdsItems(
      builder, selection.splits[SPLITS.index(split)], features
    ),
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
