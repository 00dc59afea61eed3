"""The cluster 'code_reading': what a function of Python's library is like."""

import ast
import re
from collections.abc import Sequence

from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of
from moe_jax.data.sources.instructions.library import (
  Function,
  functions,
  shorter,
)

# Texts that are cut from a function so that it no longer parses, each with
# the text that is put in instead.
_BREAKS = ((':\n', '\n'), ('(', ''), (')', ''), ('return ', 'return return '))
_YES_NO = ('yes', 'no')


def answers(
  dice: Dice, right: str, texts: Sequence[str], count: int
) -> tuple[str, ...]:
  """Different answers in random order, the right one among them.

  Args:
    dice: The dice.
    right: The right answer.
    texts: Texts from which the wrong answers are taken.
    count: Number of answers.
  """
  wrong = [text for text in dict.fromkeys(texts) if text != right]
  return tuple(dice.sample([right, *dice.sample(wrong, count - 1)], count))


def unnamed(function: Function) -> str:
  """The source of a function with another name."""
  return re.sub(rf'\b{function.name}\b', 'f', function.source)


def _count_arguments(dice: Dice) -> Drawn:
  function = dice.one(functions())
  return Drawn(function.source, str(function.num_arguments))


def _returns_value(dice: Dice) -> Drawn:
  function = dice.one(functions())
  answer = 'yes' if function.returns else 'no'
  return Drawn(function.source, answer, _YES_NO)


def _parses(dice: Dice) -> Drawn:
  function = dice.one(functions())
  text, (old, new) = function.source, dice.one(_BREAKS)
  if dice.below(2):
    text = text.replace(old, new, 1)
  try:
    ast.parse(text)
    answer = 'yes'
  except SyntaxError:
    answer = 'no'
  # A function is in one split, whole and broken.
  return Drawn(text, answer, _YES_NO, key=function.source)


def _name_function(dice: Dice) -> Drawn:
  candidates = shorter(110, 16, 72)
  function = dice.one(candidates)
  choices = answers(dice, function.name, [f.name for f in candidates], 4)
  return Drawn(unnamed(function), function.name, choices, key=function.source)


TASKS = cluster_of(
  'code_reading',
  count_arguments=(
    _count_arguments,
    (
      'Count the arguments, without self and cls.\n{question}',
      '{question}\nHow many arguments does it have, besides self and cls?',
      'def f(self, a, b) has 2 arguments besides self. How many has this '
      'function, besides self and cls?\n{question}',
    ),
  ),
  returns_value=(
    _returns_value,
    (
      'Does this function return a value?\n{question}',
      '{question}\nDoes this function ever return anything?',
      'Say whether a return in this function has a value.\n{question}',
    ),
  ),
  parses=(
    _parses,
    (
      'Does this parse?\n{question}',
      '{question}\nIs this valid Python?',
      'Say whether Python can parse this.\n{question}',
    ),
  ),
  name_function=(
    _name_function,
    (
      'Name this function.\n{question}',
      '{question}\nWhat is a better name than f?',
      "In Python's library, f has another name. Which one?\n{question}",
    ),
  ),
)
