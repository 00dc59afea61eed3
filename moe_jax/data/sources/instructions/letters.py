"""The cluster 'letters': what a word is made of."""

import string

from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of
from moe_jax.data.sources.instructions.sequences import words


def _count_letters(dice: Dice) -> Drawn:
  word = dice.word('abcdef', 4, 9)
  letter = dice.one('abcdef')
  return Drawn(f'{letter} in {word}', str(word.count(letter)))


def _length(dice: Dice) -> Drawn:
  word = dice.word(string.ascii_lowercase, 3, 12)
  return Drawn(word, str(len(word)))


def _initials(dice: Dice) -> Drawn:
  drawn = words(dice, 3, 5)
  return Drawn(' '.join(drawn), ''.join(word[0] for word in drawn))


def _upper(dice: Dice) -> Drawn:
  word = dice.word(string.ascii_lowercase, 4, 8)
  return Drawn(word, word.upper())


def _palindrome(dice: Dice) -> Drawn:
  half = dice.word(string.ascii_lowercase, 3, 4)
  same = half + half[::-1]
  at = dice.below(len(half))
  other = half[:at] + dice.one(string.ascii_lowercase) + half[at + 1 :]
  word = dice.one([same, other + half[::-1]])
  answer = 'yes' if word == word[::-1] else 'no'
  return Drawn(word, answer, ('yes', 'no'))


TASKS = cluster_of(
  'letters',
  count_letters=(
    _count_letters,
    (
      'Count: {question}',
      'How many times is the letter {question}?',
      '{question}\nNumber of times:',
    ),
  ),
  length=(
    _length,
    (
      'Length: {question}',
      'How many letters does {question} have?',
      '{question}\nNumber of letters:',
    ),
  ),
  initials=(
    _initials,
    (
      'Initials: {question}',
      'Join the first letters of these words.\n{question}',
      '{question}\nThe first letters are',
    ),
  ),
  upper=(
    _upper,
    (
      'Capitals: {question}',
      'Write {question} in capital letters.',
      '{question}\nThe same in capitals:',
    ),
  ),
  palindrome=(
    _palindrome,
    (
      'Palindrome? {question}',
      'Is {question} the same backwards?',
      '{question}\nIs it a palindrome?',
    ),
  ),
)
