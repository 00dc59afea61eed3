"""The cluster 'code_writing': texts on and of Python's library."""

import dataclasses

from moe_jax.data.sources.instructions.code_reading import answers
from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of
from moe_jax.data.sources.instructions.library import functions, shorter


def _write_docstring(dice: Dice) -> Drawn:
  function = dice.one(functions())
  return Drawn(function.source, function.summary)


def _choose_docstring(dice: Dice) -> Drawn:
  candidates = shorter(100, 40, 32)
  function = dice.one(candidates)
  choices = answers(dice, function.summary, [f.summary for f in candidates], 3)
  return Drawn(function.source, function.summary, choices)


def _repair_indentation(dice: Dice) -> Drawn:
  # A row has the function twice, so it has to be shorter than for other tasks.
  function = dice.one(shorter(90, 40, 72))
  lines = function.source.split('\n')
  broken = [line.strip() for line in lines]
  return Drawn('\n'.join(broken), function.source, key=function.source)


def _finish_line(dice: Dice) -> Drawn:
  function = dice.one(functions())
  lines = [line.rstrip() for line in function.source.split('\n')]
  long = [i for i, line in enumerate(lines) if len(line.strip()) > 12]
  index = dice.one(long or [0])
  line, words = lines[index], lines[index].lstrip()
  cut = len(line) - (len(words) + 1) // 2
  question = '\n'.join([*lines[:index], line[:cut]])
  return Drawn(question, line[cut:], key=function.source)


_EVERY = cluster_of(
  'code_writing',
  write_docstring=(
    _write_docstring,
    (
      'Write a docstring.\n{question}',
      '{question}\nWhat does this function do?',
      'Describe this function in one line.\n{question}',
    ),
  ),
  choose_docstring=(
    _choose_docstring,
    (
      'Which docstring belongs to this function?\n{question}',
      '{question}\nWhich of these lines describes this function?',
      'Choose the description of this function.\n{question}',
    ),
  ),
  repair_indentation=(
    _repair_indentation,
    (
      'Indent:\n{question}',
      '{question}\nThe same with its indentation:',
      'The indentation of these lines is lost. Restore it.\n{question}',
    ),
  ),
  finish_line=(
    _finish_line,
    (
      'Finish the last line.\n{question}',
      'How does the last line continue?\n{question}',
      'Complete the last line of this code.\n{question}',
    ),
  ),
)
_BY_CHRF = ('write_docstring', 'finish_line')
TASKS = tuple(
  dataclasses.replace(task, metric='chrf') if task.name in _BY_CHRF else task
  for task in _EVERY
)
