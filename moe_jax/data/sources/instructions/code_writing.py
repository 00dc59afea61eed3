"""The cluster 'code_writing': texts on and of Python's library."""

import dataclasses

from moe_jax.data.sources.instructions.code_reading import answers
from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of
from moe_jax.data.sources.instructions.library import functions, shorter


def _write_docstring(dice: Dice) -> Drawn:
  function = dice.one(functions())
  return Drawn(function.source, function.summary)


def _choose_docstring(dice: Dice) -> Drawn:
  some = shorter(100, 40, 32)
  function = dice.one(some)
  choices = answers(dice, function.summary, [f.summary for f in some], 3)
  return Drawn(function.source, function.summary, choices)


def _repair_indentation(dice: Dice) -> Drawn:
  # A function is in the row twice.
  function = dice.one(shorter(90, 40, 72))
  lines = function.source.split('\n')
  broken = [line.strip() for line in lines]
  return Drawn('\n'.join(broken), function.source, key=function.source)


def _finish_line(dice: Dice) -> Drawn:
  function = dice.one(functions())
  lines = [line for line in function.source.split('\n') if len(line) > 12]
  line = dice.one(lines or [function.source.split('\n')[0]])
  before, _, _ = function.source.partition(line)
  cut = len(line) // 2
  return Drawn(
    before + line[:cut], line[cut:].rstrip() or '#', key=function.source
  )


_EVERY = cluster_of(
  'code_writing',
  write_docstring=(
    _write_docstring,
    (
      'Write a docstring.\n{question}',
      '{question}\nWhat does this function do?',
      'Describe this function in a line.\n{question}',
    ),
  ),
  choose_docstring=(
    _choose_docstring,
    (
      'Which docstring belongs to it?\n{question}',
      '{question}\nWhich of these lines describes it?',
      'Choose the description.\n{question}',
    ),
  ),
  repair_indentation=(
    _repair_indentation,
    (
      'Indent:\n{question}',
      '{question}\nThe same with its indentation:',
      'The blanks at the begin of the lines are lost. Repair it.\n{question}',
    ),
  ),
  finish_line=(
    _finish_line,
    (
      'Finish the last line.\n{question}',
      'How does the last line go on?\n{question}',
      'Complete the line of code.\n{question}',
    ),
  ),
)
_BY_CHRF = ('write_docstring', 'finish_line')
TASKS = tuple(
  dataclasses.replace(task, metric='chrf') if task.name in _BY_CHRF else task
  for task in _EVERY
)
