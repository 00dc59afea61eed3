"""The cluster 'arithmetic': small sums, and which number is larger."""

from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of


def _add(dice: Dice) -> Drawn:
  a, b = dice.below(1000), dice.below(1000)
  return Drawn(f'{a} + {b}', str(a + b))


def _subtract(dice: Dice) -> Drawn:
  a, b = dice.below(1000), dice.below(1000)
  return Drawn(f'{a} - {b}', str(a - b))


def _multiply(dice: Dice) -> Drawn:
  a, b = dice.between(2, 99), dice.between(2, 12)
  return Drawn(f'{a} * {b}', str(a * b))


def _larger(dice: Dice) -> Drawn:
  a, b = dice.below(10000), dice.below(10000)
  if a == b:
    b += 1
  choices = str(a), str(b)
  return Drawn(f'{a} {b}', str(max(a, b)), choices)


_SUMS = (
  '{question} =',
  'What is {question}?',
  'Calculate {question} and give the number.',
)

TASKS = cluster_of(
  'arithmetic',
  add=(_add, _SUMS),
  subtract=(_subtract, _SUMS),
  multiply=(_multiply, _SUMS),
  larger=(
    _larger,
    (
      'Larger: {question}',
      'Which of these two numbers is larger?\n{question}',
      '{question}\nThe larger one is',
    ),
  ),
)
