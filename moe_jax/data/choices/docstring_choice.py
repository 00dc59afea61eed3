"""Questions on the standard library: which docstring belongs to a function."""

import dataclasses
from collections.abc import Sequence

from moe_jax.data.choices.contract import (
  ChoiceSourceOptions,
  Item,
  ItemSource,
)
from moe_jax.data.sources.contract import Selection
from moe_jax.data.sources.python_stdlib_docstrings import DocstringsSource
from moe_jax.errors import InputError
from moe_jax.options import option

NUM_ANSWERS = 4


@dataclasses.dataclass(frozen=True)
class DocstringChoiceSource(ChoiceSourceOptions):
  """A function of the library, and the first lines of four docstrings."""

  modules: str = option(
    '',
    'Names of the top-level modules and packages whose functions the '
    "questions are about, separated by commas: 'json,email'; '' is all of the "
    'standard library.',
  )

  def items(self, selection: Selection = Selection()) -> ItemSource:
    """An item for each function, with wrong answers from the same split.

    Raises:
      ValueError: A module is not of the standard library.
    """
    source = DocstringsSource(self.modules).pairs(selection)

    def items(split):
      pairs = [
        (function, docstring.split('\n')[0].strip())
        for function, docstring in source.pairs(split)
      ]
      return with_distractors([pair for pair in pairs if all(pair)])

    return ItemSource(f'first lines of {source.name}', items)


def with_distractors(pairs: Sequence[tuple[str, str]]) -> list[Item]:
  """An item for each pair, with wrong answers from other pairs.

  The j-th wrong answer to pair i of P is that of pair i + j P / 4, or of the
  next pair with another answer. The index of the right answer is i mod 4.

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
