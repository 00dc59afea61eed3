"""The cluster 'sequences': words in another order."""

from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of

_LETTERS = 'abcdefghijklmnopqrstuvwxyz'


def words(dice: Dice, low: int = 2, high: int = 4) -> list[str]:
  """Random words of two to four letters, all different."""
  count, drawn = dice.between(low, high), []
  while len(drawn) < count:
    word = dice.word(_LETTERS, 2, 4)
    if word not in drawn:
      drawn.append(word)
  return drawn


def _copy(dice: Dice) -> Drawn:
  text = ' '.join(words(dice))
  return Drawn(text, text)


def _reverse(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 4, 8)
  return Drawn(word, word[::-1])


def _reverse_words(dice: Dice) -> Drawn:
  drawn = words(dice)
  return Drawn(' '.join(drawn), ' '.join(drawn[::-1]))


def _sort_words(dice: Dice) -> Drawn:
  drawn = words(dice)
  return Drawn(' '.join(drawn), ' '.join(sorted(drawn)))


def _same(dice: Dice) -> Drawn:
  one = words(dice, 2, 3)
  other = dice.one([one, one[::-1], [*one[:-1], dice.word(_LETTERS, 2, 4)]])
  answer = 'yes' if one == other else 'no'
  return Drawn(f'{" ".join(one)} | {" ".join(other)}', answer, ('yes', 'no'))


TASKS = cluster_of(
  'sequences',
  copy=(
    _copy,
    ('Copy: {question}', 'Repeat this text.\n{question}', '{question}\nAgain:'),
  ),
  reverse=(
    _reverse,
    (
      'Reverse: {question}',
      'Write {question} backwards.',
      'What is {question} from its last letter to its first?',
    ),
  ),
  reverse_words=(
    _reverse_words,
    (
      'Last word first: {question}',
      'Reverse the order of the words.\n{question}',
      '{question}\nThe same words, from the last to the first:',
    ),
  ),
  sort_words=(
    _sort_words,
    (
      'Sort: {question}',
      'Put these words in alphabetical order.\n{question}',
      '{question}\nIn dictionary order:',
    ),
  ),
  same=(
    _same,
    (
      'Equal? {question}',
      'Are both sides of the bar the same text?\n{question}',
      '{question}\nIs the left the same as the right?',
    ),
  ),
)
