"""Four vowels of men, women and children: Peterson and Barney, 1952.

https://doi.org/10.1121/1.1906875 measured the first formants of ten vowels,
each said twice by 76 speakers. Jacobs et al. 1991
(https://doi.org/10.1162/neco.1991.3.1.79) learn [i], [I], [a] and [A] (heed,
hid, hod, hud) from F1 and F2 in kHz, from the first 50 of 75 speakers, and
test on the others.

The table is not in this package: `open_table` reads a file of it. Without one,
`Drawn` draws speakers from the means that the paper printed. Praat has the
table too; with the package praat-parselmouth:

    parselmouth.praat.call(
      parselmouth.praat.call('Create formant table (Peterson & Barney 1952)'),
      'Save as tab-separated file', 'peterson_barney.tsv',
    )
"""

import csv
import io
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config import unknown
from moe_jax.data.sources.classes import ClassSource, Examples

CLASSES = ('i', 'I', 'a', 'A')
CODES = ('iy', 'ih', 'aa', 'ah')  # as files have them
ALL_CODES = (*CODES, 'eh', 'ae', 'ao', 'uh', 'uw', 'er')
SPLITS = ('train', 'validation')
TRAIN_SPEAKERS = 50

# F1, F2 in Hz, a vowel of CLASSES each: table II of 1952, read in a
# transcription of it, and within 3 % of what the tokens that Praat has average.
MEANS = {
  'men': ((270, 2290), (390, 1990), (730, 1090), (640, 1190)),
  'women': ((310, 2790), (430, 2480), (850, 1220), (760, 1400)),
  'children': ((370, 3200), (530, 2730), (1030, 1370), (850, 1590)),
}
# 1991 has 75 speakers of the 76, and does not say which; here it is a child
# that is missing.
SPEAKERS = {'men': 33, 'women': 28, 'children': 14}
# Standard deviations of the logarithms of F1 and F2. The paper printed none;
# these are rounded from those of the men and women in Praat's table.
OF_SPEAKER = (0.07, 0.05)  # of all their vowels, with this correlation:
CORRELATION = 0.3
OF_VOWEL = (0.08, 0.05)  # of a speaker's vowel
OF_TOKEN = (0.06, 0.03)  # between the two times that it is said
REPETITIONS = 2


class Token(NamedTuple):
  """One vowel, said once.

  Attributes:
    speaker: Their number.
    vowel: Index in `CLASSES`.
    formants: F1 and F2 in Hz.
    misheard: Whether the file marks it as not heard alike by all listeners.
  """

  speaker: int
  vowel: int
  formants: tuple[float, float]
  misheard: bool


class Vowels(ClassSource):
  """Tokens, the first 50 speakers to train on, the others to validate."""

  classes = CLASSES

  def __init__(self, name: str, tokens: Sequence[Token]):
    """Speakers are in the order of their tokens.

    Raises:
      ValueError: There are not enough of them.
    """
    self.name, self.tokens = name, tuple(tokens)
    speakers = list(dict.fromkeys(token.speaker for token in tokens))
    if len(speakers) <= TRAIN_SPEAKERS:
      raise ValueError(
        f'{name}: {len(speakers)} speakers; {TRAIN_SPEAKERS} are to train on '
        'and at least one to validate'
      )
    self._speakers = dict(
      zip(
        SPLITS,
        (speakers[:TRAIN_SPEAKERS], speakers[TRAIN_SPEAKERS:]),
        strict=True,
      )
    )

  def examples(self, split: str) -> Examples:
    """See `ClassSource`; F1 and F2 in kHz, as in 1991."""
    if split not in self._speakers:
      raise unknown('split', split, SPLITS)
    speakers = set(self._speakers[split])
    mine = [token for token in self.tokens if token.speaker in speakers]
    features = np.array([token.formants for token in mine], np.float32) / 1000
    return Examples(features, np.array([t.vowel for t in mine], np.int32))


class Drawn(Vowels):
  """Speakers who never spoke: drawn around the means of 1952.

  A formant is the mean of its group and vowel times three lognormal factors:
  of the speaker (the length of a vocal tract moves all formants), of the
  speaker's vowel, of the token. Where the factors are from, see this file's
  constants.
  """

  def __init__(self, seed: int = 1952):
    """The same speakers for the same seed."""
    rng = np.random.default_rng(seed)
    tokens, speaker = [], 0
    mix = np.array([[1, 0], [CORRELATION, (1 - CORRELATION**2) ** 0.5]])
    for group, count in SPEAKERS.items():
      for _ in range(count):
        speaker += 1
        shift = mix @ rng.standard_normal(2) * OF_SPEAKER
        for vowel, mean in enumerate(MEANS[group]):
          own = rng.standard_normal(2) * OF_VOWEL
          for _ in range(REPETITIONS):
            said = shift + own + rng.standard_normal(2) * OF_TOKEN
            f1, f2 = (np.array(mean) * np.exp(said)).tolist()
            tokens.append(Token(speaker, vowel, (f1, f2), misheard=False))
    name = 'vowels, drawn around the means of Peterson and Barney 1952'
    super().__init__(name, tokens)


def open_table(path: str) -> Vowels:
  """The four vowels in a file of the table of 1952.

  It has a token a line, and either a first line of names, Speaker, Vowel, F1
  and F2 among them (as Praat writes it), or on every line: group, speaker,
  vowel's number, phoneme, F0, F1, F2, F3; more columns may stand before the
  speaker. An asterisk before or after a phoneme ('*ih') marks a token that not
  all listeners heard alike: it is kept, as in 1991. Lines that begin with '#'
  are left out.

  Raises:
    ValueError: There is no such file, a line is not of that form, or there
      are fewer than 51 speakers.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise ValueError(f"source 'files:{path}': no file {file}")
  text = file.read_text(encoding='utf-8', errors='replace')
  lines = [
    (number, line.strip())
    for number, line in enumerate(text.splitlines(), 1)
    if line.strip() and not line.startswith('#')
  ]
  if lines and re.search(r'\bspeaker\b', lines[0][1], re.IGNORECASE):
    found = _with_names(file, lines)
  else:
    found = [_token(file, number, line.split()) for number, line in lines]
  tokens = [token for token in found if token is not None]
  return Vowels(f'vowels of {file.name} (Peterson and Barney 1952)', tokens)


def _token(file, number: int, fields: Sequence[str]) -> Token | None:
  """Of group, ..., speaker, vowel's number, phoneme, F0, F1, F2, F3."""
  try:
    speaker, phoneme, (f1, f2) = fields[-7], fields[-5], fields[-3:-1]
    return _made(int(speaker), phoneme, f1, f2)
  except (IndexError, ValueError) as error:
    raise ValueError(
      f'{file}, line {number}: {" ".join(fields)!r} is not group, speaker, '
      f'number of the vowel, phoneme, F0, F1, F2, F3: {error}'
    ) from error


def _with_names(file, lines) -> list[Token | None]:
  """Of a table whose first line names its columns."""
  texts = [line for _, line in lines]
  delimiter = next((d for d in '\t,;' if d in texts[0]), ' ')
  rows = csv.DictReader(io.StringIO('\n'.join(texts)), delimiter=delimiter)
  tokens = []
  for (number, _), row in zip(lines[1:], rows, strict=False):
    row = {str(k).strip(' "').lower(): v for k, v in row.items()}
    try:
      values = (row[name] for name in ('speaker', 'vowel', 'f1', 'f2'))
      speaker, vowel, f1, f2 = values
      tokens.append(_made(int(speaker), vowel, f1, f2))
    except KeyError as error:
      raise unknown(f'column of {file}:', error.args[0], row) from error
    except (TypeError, ValueError) as error:
      raise ValueError(f'{file}, line {number}: {error}') from error
  return tokens


def _made(speaker: int, phoneme: str, f1: str, f2: str) -> Token | None:
  """None where it is another vowel."""
  code = phoneme.strip('*').lower()
  if code not in ALL_CODES:
    raise unknown('phoneme', phoneme, ALL_CODES)
  formants = float(f1), float(f2)
  if not min(formants) > 0:
    raise ValueError(f'F1={f1} and F2={f2} Hz are not above 0')
  if code not in CODES:
    return None
  return Token(speaker, CODES.index(code), formants, '*' in phoneme)
