"""The contract of tasks with instructions, and the texts of their examples.

An example follows from the task, the split and its number alone. Not here: the
tasks, one file for each cluster.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from moe_jax.data.sources.contract import SPLITS, Question
from moe_jax.data.sources.python_stdlib import split_of
from moe_jax.errors import InputError
from moe_jax.options import unknown

T = TypeVar('T')
# Number of draws after which a task is taken to have no example of a split; one
# draw in 20 is for validation.
_MOST_DRAWS = 2000


class Dice:
  """Draws that are the same on every machine, for one text."""

  def __init__(self, text: str):
    # Python promises that `random` stays as it is, and no other method.
    self._random = random.Random(text).random

  def below(self, n: int) -> int:
    """An integer in [0, n)."""
    return int(self._random() * n)

  def between(self, low: int, high: int) -> int:
    """An integer in [low, high]."""
    return low + self.below(high - low + 1)

  def one(self, items: Sequence[T]) -> T:
    """One of the items."""
    return items[self.below(len(items))]

  def sample(self, items: Sequence[T], count: int) -> list[T]:
    """Different items, in random order."""
    rest = list(items)
    return [rest.pop(self.below(len(rest))) for _ in range(count)]

  def word(self, letters: str, low: int, high: int) -> str:
    """A word of these letters, of a length in [low, high]."""
    return ''.join(self.one(letters) for _ in range(self.between(low, high)))


class Drawn(NamedTuple):
  """The content of one example of a task, without words around it.

  Attributes:
    question: Text that is asked about.
    answer: The right answer; not empty.
    choices: Answers to choose from, the right one among them; empty where any
      text can be the answer.
    key: Text whose hash decides the split of the example, so that examples of
      one key, of whatever tasks, are all in one split; '' takes the question.
  """

  question: str
  answer: str
  choices: tuple[str, ...] = ()
  key: str = ''

  @property
  def subject(self) -> str:
    """The key, or else the question: what no two splits have in common."""
    return self.key or self.question


@dataclasses.dataclass(frozen=True)
class InstructionTask:
  """A task with instructions.

  Attributes:
    name: Its name.
    cluster: Name of the cluster of similar tasks.
    templates: Instructions, three or more, each with `{question}` in it.
    draw: Function that draws a question and its answer.
    metric: Name of the score of an answer that is no choice.
    needs: Python package without which the task cannot be used; '' for none.
  """

  name: str
  cluster: str
  templates: tuple[str, ...]
  draw: Callable[[Dice], Drawn]
  metric: str = 'exact_match'
  needs: str = ''

  def drawn(self, split: str, index: int) -> tuple[Drawn, Dice]:
    """The content of example `index` of a split, and the dice for its words.

    Raises:
      ValueError: The index is negative, the split is neither of our two, or
        the task has no example of it.
    """
    if split not in SPLITS:
      raise unknown('split of a task', split, SPLITS)
    if index < 0:
      raise InputError(f'example {index} of task {self.name!r} is negative')
    for attempt in range(_MOST_DRAWS):
      dice = Dice(f'{self.name} {split} {index} {attempt}')
      drawn = self.draw(dice)
      if split_of(drawn.subject) == split:
        return drawn, dice
    raise InputError(
      f'task {self.name!r} has no example of split {split!r} in {_MOST_DRAWS} '
      'draws'
    )

  def __call__(self, split: str, index: int, num_shots: int = 0) -> Question:
    """Example `index` of 'train' or 'validation'.

    Args:
      split: The split; a key that one split has is never in the other.
      index: Number of the example, from 0; there is no last.
      num_shots: Number of other examples, always of 'train', that stand before
        it with their answers, in the same words; all are of different keys.

    Raises:
      ValueError: As `drawn`, or the task has too few examples.
    """
    drawn, dice = self.drawn(split, index)
    template = dice.one(self.templates)
    # No example has the subject of the question, as it might give the answer.
    texts, subjects = [], {drawn.subject}
    for _ in range(num_shots):
      shot = self._other(dice, subjects)
      subjects.add(shot.subject)
      texts.append(f'{_question_text(template, shot)}\n{shot.answer}')
    texts.append(_question_text(template, drawn))
    return Question(
      '\n\n'.join(texts), drawn.answer, drawn.choices, self.metric
    )

  def _other(self, dice: Dice, subjects: set[str]) -> Drawn:
    """A training example about anything else."""
    for _ in range(_MOST_DRAWS):
      shot, _ = self.drawn('train', dice.below(2**31))
      if shot.subject not in subjects:
        return shot
    raise InputError(
      f'task {self.name!r} has no training example besides {len(subjects)} '
      f'others in {_MOST_DRAWS} draws; take fewer shots'
    )


def _question_text(template: str, drawn: Drawn) -> str:
  text = template.format(question=drawn.question)
  if drawn.choices:
    text += ''.join(f'\n- {choice}' for choice in drawn.choices)
  return text


def cluster_of(
  cluster: str, **tasks: tuple[Callable[[Dice], Drawn], Sequence[str]]
) -> tuple[InstructionTask, ...]:
  """The tasks of a cluster, each given by its draw and its templates."""
  return tuple(
    InstructionTask(name, cluster, tuple(templates), draw)
    for name, (draw, templates) in tasks.items()
  )
