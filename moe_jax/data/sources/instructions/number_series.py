"""The cluster 'number_series': what numbers in a row have in common."""

from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of


def _series(numbers) -> str:
  return ' '.join(map(str, numbers))


def _next_number(dice: Dice) -> Drawn:
  start, step = dice.below(100), dice.between(1, 12)
  numbers = [start + step * i for i in range(5)]
  return Drawn(_series(numbers[:4]), str(numbers[4]))


def _next_power(dice: Dice) -> Drawn:
  start, base = dice.between(1, 120), dice.between(2, 5)
  numbers = [start * base**i for i in range(4)]
  return Drawn(_series(numbers[:3]), str(numbers[3]))


def _largest(dice: Dice) -> Drawn:
  numbers = [dice.below(100) for _ in range(dice.between(3, 5))]
  return Drawn(_series(numbers), str(max(numbers)))


def _direction(dice: Dice) -> Drawn:
  numbers = sorted(dice.sample(range(1000), 4))
  mixed = [*numbers[1:], numbers[0]]
  choices = 'up', 'down', 'neither'
  answer = dice.one(choices)
  row = {'up': numbers, 'down': numbers[::-1], 'neither': mixed}[answer]
  return Drawn(_series(row), answer, choices)


TASKS = cluster_of(
  'number_series',
  next_number=(
    _next_number,
    (
      'Next number: {question}',
      'These numbers go up by equal steps. Which comes next?\n{question}',
      '{question} and then',
    ),
  ),
  next_power=(
    _next_power,
    (
      'Next product: {question}',
      'Each number is the one before it times the same factor. Which comes '
      'next?\n{question}',
      '{question}\nThe series continues with',
    ),
  ),
  largest=(
    _largest,
    (
      'Maximum: {question}',
      'Which is the largest of these numbers?\n{question}',
      '{question}\nNone of them is larger than',
    ),
  ),
  direction=(
    _direction,
    (
      'Direction: {question}',
      'Do these numbers go up, down, or neither?\n{question}',
      '{question}\nThe series goes',
    ),
  ),
)
