"""Examples of a task with instructions, from the suite without downloads."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from moe_jax.data.sources import instructions
from moe_jax.data.sources.contract import (
  SPLITS,
  Pair,
  Pairs,
  Question,
  Selection,
  SourceOptions,
)
from moe_jax.options import at_least, one_of, option

_SMALL = 40  # examples of a run with ':runlocal'


@dataclasses.dataclass(frozen=True)
class InstructionSource(SourceOptions):
  """Instructions of one task and their answers, made when they are read.

  With examples before an instruction, set `task.seq2seq.keep_end` for the task
  seq2seq, so that what is too long for a row loses examples and keeps what is
  asked.
  """

  is_embedded: ClassVar[bool] = True

  task: str = option(
    'reverse',
    'Name of the task; the command '
    '`python -m moe_jax.data.sources.instructions` prints all with an example.',
    one_of(*instructions.TASKS),
  )
  num_train: int = option(
    1000,
    'Number of examples for training; a larger number adds examples to those '
    'of a smaller one.',
    at_least(1),
  )
  num_validation: int = option(
    100, 'Number of examples for validation.', at_least(1)
  )
  num_shots: int = option(
    0,
    'Number of other examples with their answers that stand before each '
    'instruction, in the same words; 0 is zero-shot.',
    at_least(0),
  )

  @property
  def cluster(self) -> str:
    """The cluster of the task."""
    return instructions.TASKS[self.task].cluster

  def questions(self, selection: Selection = Selection()) -> list[Question]:
    """The validation examples.

    Raises:
      ValueError: A split is neither of our two.
    """
    return list(self._examples(selection.name_of('validation')))

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """Instructions and answers; no question is in both splits.

    Raises:
      ValueError: As `questions`.
    """
    selection.check_splits('instructions')
    sizes = self.num_train, self.num_validation

    def of_split(split: str) -> Iterator[Pair]:
      examples = self._examples(selection.name_of(split))
      return ((question.inputs, question.target) for question in examples)

    shots = f', {self.num_shots} shots' * bool(self.num_shots)
    return Pairs(
      f'instructions:{self.task}{shots} (embedded)',
      f'{instructions.identity(self.task)} {sizes} {self.num_shots} '
      f'{selection.splits}',
      of_split,
    )

  def shrunk(self) -> 'InstructionSource':
    """The same task with few examples."""
    return dataclasses.replace(
      self,
      num_train=min(self.num_train, _SMALL),
      num_validation=min(self.num_validation, _SMALL),
    )

  def _examples(self, split: str) -> Iterator[Question]:
    task = instructions.TASKS[self.task]
    count = dict(zip(SPLITS, (self.num_train, self.num_validation)))[split]
    return (task(split, i, self.num_shots) for i in range(count))
