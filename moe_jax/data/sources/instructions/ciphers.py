"""The cluster 'ciphers': words in secret and in Morse code."""

import codecs
import string

from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of

_LETTERS = string.ascii_lowercase
# International Morse code, ITU-R M.1677-1.
_CODES = (
  '.- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. '
  '... - ..- ...- .-- -..- -.-- --..'
)
MORSE = dict(zip(_LETTERS, _CODES.split()))


def _rot13(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 4, 8)
  return Drawn(word, codecs.encode(word, 'rot13'))


def _caesar(dice: Dice) -> Drawn:
  word, step = dice.word(_LETTERS, 4, 6), dice.between(1, 5)
  moved = _LETTERS[step:] + _LETTERS[:step]
  table = str.maketrans(_LETTERS, moved)
  return Drawn(f'{word} by {step}', word.translate(table))


def _atbash(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 4, 8)
  return Drawn(word, word.translate(str.maketrans(_LETTERS, _LETTERS[::-1])))


def _to_morse(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 3, 4)
  return Drawn(word, ' '.join(MORSE[letter] for letter in word))


def _from_morse(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 3, 4)
  # The word decides the split, as in the other direction.
  return Drawn(' '.join(MORSE[letter] for letter in word), word, key=word)


TASKS = cluster_of(
  'ciphers',
  rot13=(
    _rot13,
    (
      'ROT13: {question}',
      'Move every letter 13 places along the alphabet.\n{question}',
      '{question}\nIn ROT13 that is',
    ),
  ),
  caesar=(
    _caesar,
    (
      'Caesar: {question}',
      'Shift the letters of {question} along the alphabet.',
      'Encipher with a Caesar cipher: {question}',
    ),
  ),
  atbash=(
    _atbash,
    (
      'Atbash: {question}',
      'Write z for a, y for b, and so on.\n{question}',
      '{question}\nWith the alphabet reversed:',
    ),
  ),
  to_morse=(
    _to_morse,
    (
      'Morse: {question}',
      'Write {question} in Morse code.',
      '{question}\nIn dots and dashes:',
    ),
  ),
  from_morse=(
    _from_morse,
    (
      'Letters: {question}',
      'Which word does this Morse code spell?\n{question}',
      '{question}\nIn letters:',
    ),
  ),
)
