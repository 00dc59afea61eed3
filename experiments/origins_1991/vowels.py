"""Four vowels of men, women and children: Peterson and Barney, 1952.

https://doi.org/10.1121/1.1906875 measured the first formants of ten vowels,
each said twice by 76 speakers. Jacobs et al. 1991 learn [i], [I], [a] and [A]
(heed, hid, hod, hud) from F1 and F2 in kHz, from the first 50 of 75 speakers,
and test on the others.

The table is not in this repository. Without a file, speakers are drawn around
the means that the paper printed. Praat has the table; with the package
praat-parselmouth:

    parselmouth.praat.call(
      parselmouth.praat.call('Create formant table (Peterson & Barney 1952)'),
      'Save as tab-separated file', 'peterson_barney.tsv',
    )
"""

import csv
import pathlib
from typing import NamedTuple

import numpy as np

from experiments.study.runner import arrays_digest
from moe_jax.errors import InputError

CLASSES = ('i', 'I', 'a', 'A')
# Codes of these vowels in files, and of the six others of 1952.
CODES = ('iy', 'ih', 'aa', 'ah')
OTHERS = ('eh', 'ae', 'ao', 'uh', 'uw', 'er')
TRAIN_SPEAKERS = 50

# F1 and F2 in Hz of each vowel of CLASSES: table II of 1952, from a
# transcription, and within 3 % of the averages of Praat's tokens.
MEANS = {
  'men': ((270, 2290), (390, 1990), (730, 1090), (640, 1190)),
  'women': ((310, 2790), (430, 2480), (850, 1220), (760, 1400)),
  'children': ((370, 3200), (530, 2730), (1030, 1370), (850, 1590)),
}
# The paper of 1991 has 75 of the 76 speakers and does not say which; here a
# child is left out.
SPEAKERS = {'men': 33, 'women': 28, 'children': 14}
# Standard deviations of the logarithms of F1 and F2. The paper printed none;
# these are rounded from those of the men and women in Praat's table: between
# speakers (where F1 and F2 correlate), between the vowels of a speaker, and
# between utterances of a vowel.
OF_SPEAKER = (0.07, 0.05)
CORRELATION = 0.3
OF_VOWEL = (0.08, 0.05)
OF_TOKEN = (0.06, 0.03)
REPETITIONS = 2

# One utterance: its speaker, the vowel's index in `CLASSES`, F1 and F2 in Hz.
Token = tuple[int, int, float, float]


class Vowels(NamedTuple):
  """Vowels of the speakers of one split.

  Attributes:
    features: F1 and F2 in kHz, float32 [N, 2].
    labels: Indices in `CLASSES`, int32 [N].
  """

  features: np.ndarray
  labels: np.ndarray


def load(table: str = '') -> tuple[Vowels, Vowels]:
  """Vowels to train on, those of the first 50 speakers, and to test on.

  Args:
    table: Path of a file with the table of 1952; '' draws the speakers.

  Raises:
    ValueError: There is no such file, a line of it is bad, or there are fewer
      than 51 speakers.
  """
  tokens = np.reshape(read(table) if table else drawn(), (-1, 4))
  speakers = list(dict.fromkeys(tokens[:, 0]))
  if len(speakers) <= TRAIN_SPEAKERS:
    raise InputError(
      f'{len(speakers)} speakers of vowels; {TRAIN_SPEAKERS} are to train on '
      'and at least one to test'
    )
  is_train = np.isin(tokens[:, 0], speakers[:TRAIN_SPEAKERS])

  def vowels(chosen: np.ndarray) -> Vowels:
    formants, labels = tokens[chosen, 2:], tokens[chosen, 1]
    return Vowels(formants.astype(np.float32) / 1000, labels.astype(np.int32))

  return vowels(is_train), vowels(~is_train)


def read(path: str) -> list[Token]:
  """The tokens of the four vowels in a file of the table.

  Its first line names tab-separated columns, of which Speaker, Vowel, F1 and F2
  are read. An asterisk before or after a vowel's code ('*ih') marks a token
  that not all listeners heard alike; it is kept, as in 1991.

  Raises:
    ValueError: There is no such file, or a line has another form.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise InputError(f'table of vowels: no file {file}')
  tokens = []
  lines = file.read_text(encoding='utf-8', errors='replace').splitlines()
  for number, row in enumerate(csv.DictReader(lines, delimiter='\t'), 2):
    try:
      code, speaker = row['Vowel'].strip('*').lower(), int(row['Speaker'])
      formants = [float(row[name]) for name in ('F1', 'F2')]
      if code not in (*CODES, *OTHERS) or not min(formants) > 0:
        raise ValueError(f'no vowel of {CODES + OTHERS}, or no formants in Hz')
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise InputError(f'{file}, line {number}: {row}: {error!r}') from error
    if code in CODES:
      tokens.append((speaker, CODES.index(code), *formants))
  return tokens


def drawn(seed: int = 1952) -> list[Token]:
  """Tokens of synthetic speakers around the means of 1952.

  A formant is the mean of its group and vowel times three lognormal factors:
  one for the speaker (the length of a vocal tract shifts all formants), one for
  the speaker's vowel, and one for the token.
  """
  rng = np.random.default_rng(seed)
  tokens = []
  mix = np.array([[1, 0], [CORRELATION, (1 - CORRELATION**2) ** 0.5]])
  groups = [group for group, count in SPEAKERS.items() for _ in range(count)]
  for speaker, group in enumerate(groups):
    shift = mix @ rng.standard_normal(2) * OF_SPEAKER
    for vowel, mean in enumerate(MEANS[group]):
      vowel_shift = rng.standard_normal(2) * OF_VOWEL
      for _ in range(REPETITIONS):
        log_factor = shift + vowel_shift + rng.standard_normal(2) * OF_TOKEN
        tokens.append((speaker, vowel, *np.array(mean) * np.exp(log_factor)))
  return tokens


def digest(splits: tuple[Vowels, Vowels]) -> str:
  """The sha256 of the vowels of both splits."""
  return arrays_digest(splits, f'{(2,)} {CLASSES}')
