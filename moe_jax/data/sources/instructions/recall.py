"""The cluster 'recall': what stands in the question itself."""

import string

from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of
from moe_jax.data.sources.instructions.sequences import words


def _lookup(dice: Dice) -> Drawn:
  keys = dice.sample(string.ascii_lowercase, dice.between(3, 5))
  values = [str(dice.between(10, 99)) for _ in keys]
  table = ' '.join(f'{key}={value}' for key, value in zip(keys, values))
  at = dice.below(len(keys))
  return Drawn(f'{table}; {keys[at]}?', values[at])


def _item(dice: Dice) -> Drawn:
  drawn = words(dice, 3, 5)
  at = dice.below(len(drawn))
  return Drawn(f'{at + 1} of {" ".join(drawn)}', drawn[at])


def _missing(dice: Dice) -> Drawn:
  drawn = words(dice, 3, 4)
  answer = dice.one(drawn)
  rest = dice.sample([word for word in drawn if word != answer], len(drawn) - 1)
  return Drawn(f'{" ".join(drawn)} | {" ".join(rest)}', answer)


def _contains(dice: Dice) -> Drawn:
  drawn = words(dice, 3, 5)
  other = dice.word(string.ascii_lowercase, 2, 4)
  word = dice.one([dice.one(drawn), other])
  answer = 'yes' if word in drawn else 'no'
  return Drawn(f'{word} in {" ".join(drawn)}', answer, ('yes', 'no'))


TASKS = cluster_of(
  'recall',
  lookup=(
    _lookup,
    (
      'Look up: {question}',
      'Give the value of the last letter.\n{question}',
      'Each letter has a number. {question}',
    ),
  ),
  item=(
    _item,
    (
      'Word {question}',
      'Which word is at this position, counting from 1?\n{question}',
      'Write word {question}.',
    ),
  ),
  missing=(
    _missing,
    (
      'Missing: {question}',
      'Which word on the left is not on the right?\n{question}',
      '{question}\nThe right side lacks',
    ),
  ),
  contains=(
    _contains,
    (
      'Is it there? {question}',
      'Is the first word one of the words after "in"?\n{question}',
      '{question}\nIs the first word among the others?',
    ),
  ),
)
