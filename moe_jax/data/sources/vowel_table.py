"""Reading of a file with the table of vowels of Peterson and Barney, 1952.

Not here: the source of data made from it (`vowels.py`).
"""

import csv
import io
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.errors import InputError
from moe_jax.options import unknown

# Codes in files: the four vowels used in 1991, and all ten of 1952.
CODES = ('iy', 'ih', 'aa', 'ah')
ALL_CODES = (*CODES, 'eh', 'ae', 'ao', 'uh', 'uw', 'er')


class Token(NamedTuple):
  """One utterance of a vowel.

  Attributes:
    speaker: Number of the speaker.
    vowel: Index of the vowel in `CODES`.
    formants: F1 and F2 in Hz.
    misheard: Whether the file marks that not all listeners heard this vowel.
  """

  speaker: int
  vowel: int
  formants: tuple[float, float]
  misheard: bool


def read(path: str) -> tuple[str, list[Token]]:
  """The name of a file of the table, and its tokens of the four vowels.

  The file has a token in each line. Either its first line names the columns,
  including Speaker, Vowel, F1 and F2 (as Praat writes it), or the columns are
  group, speaker, number of the vowel, phoneme, F0, F1, F2, F3, and more columns
  may precede the speaker. An asterisk before or after a phoneme ('*ih') marks a
  token that not all listeners heard alike; it is kept, as in 1991. Lines that
  begin with '#' are left out.

  Raises:
    ValueError: There is no such file, or a line has another form.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise InputError(f'table of vowels: no file {file}')
  text = file.read_text(encoding='utf-8', errors='replace')
  lines = [
    (number, line.strip())
    for number, line in enumerate(text.splitlines(), 1)
    if line.strip() and not line.startswith('#')
  ]
  if lines and re.search(r'\bspeaker\b', lines[0][1], re.IGNORECASE):
    every = _with_names(file, lines)
  else:
    every = [_token(file, number, line.split()) for number, line in lines]
  tokens = [token for token in every if token is not None]
  return f'vowels of {file.name} (Peterson and Barney 1952)', tokens


def _token(file, number: int, fields: Sequence[str]) -> Token | None:
  """The token of a line of group, ..., speaker, number, phoneme, F0, F1, ..."""
  try:
    speaker, phoneme, (f1, f2) = fields[-7], fields[-5], fields[-3:-1]
    return _vowel_token(int(speaker), phoneme, f1, f2)
  except (IndexError, ValueError) as error:
    raise InputError(
      f'{file}, line {number}: {" ".join(fields)!r} is not group, speaker, '
      f'number of the vowel, phoneme, F0, F1, F2, F3: {error}'
    ) from error


def _with_names(file, lines) -> list[Token | None]:
  """The tokens of a table whose first line names its columns."""
  texts = [line for _, line in lines]
  delimiter = next((d for d in '\t,;' if d in texts[0]), ' ')
  rows = csv.DictReader(io.StringIO('\n'.join(texts)), delimiter=delimiter)
  tokens = []
  for (number, _), row in zip(lines[1:], rows, strict=False):
    row = {str(k).strip(' "').lower(): v for k, v in row.items()}
    try:
      values = (row[name] for name in ('speaker', 'vowel', 'f1', 'f2'))
      speaker, vowel, f1, f2 = values
      tokens.append(_vowel_token(int(speaker), vowel, f1, f2))
    except KeyError as error:
      raise unknown(f'column of {file}:', error.args[0], row) from error
    except (TypeError, ValueError) as error:
      raise InputError(f'{file}, line {number}: {error}') from error
  return tokens


def _vowel_token(speaker: int, phoneme: str, f1: str, f2: str) -> Token | None:
  """The token of these fields; None if it is none of the four vowels."""
  code = phoneme.strip('*').lower()
  if code not in ALL_CODES:
    raise unknown('phoneme', phoneme, ALL_CODES)
  formants = float(f1), float(f2)
  if not min(formants) > 0:
    raise InputError(f'F1={f1} and F2={f2} Hz are not above 0')
  if code not in CODES:
    return None
  return Token(speaker, CODES.index(code), formants, '*' in phoneme)
