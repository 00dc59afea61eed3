"""Four vowels of men, women and children: Peterson and Barney, 1952.

https://doi.org/10.1121/1.1906875 measured the first formants of ten vowels,
each said twice by 76 speakers. Jacobs et al. 1991
(https://doi.org/10.1162/neco.1991.3.1.79) learn [i], [I], [a] and [A] (heed,
hid, hod, hud) from F1 and F2 in kHz, from the first 50 of 75 speakers, and
test on the others.

The table is not in this package: `vowel_table.py` reads a file of it. Without
a file, `Drawn` draws speakers around the means that the paper printed. Praat
has the table, too; with the package praat-parselmouth:

    parselmouth.praat.call(
      parselmouth.praat.call('Create formant table (Peterson & Barney 1952)'),
      'Save as tab-separated file', 'peterson_barney.tsv',
    )
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.data.sources import vowel_table
from moe_jax.data.sources.class_examples import Examples
from moe_jax.data.sources.contract import (
  SPLITS,
  ClassSource,
  Selection,
  SourceOptions,
)
from moe_jax.data.sources.vowel_table import Token
from moe_jax.errors import InputError
from moe_jax.options import option, unknown

CLASSES = ('i', 'I', 'a', 'A')
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


@dataclasses.dataclass(frozen=True)
class VowelsSource(SourceOptions):
  """Four vowels with two formants each, by many speakers."""

  names_splits = False

  table: str = option(
    '',
    "Path of a file with Peterson and Barney's table of vowels; '' draws "
    'speakers around the means that they published.',
  )

  def classes(self, selection: Selection = Selection()) -> 'Vowels':
    """The vowels of the file, or drawn ones.

    Raises:
      ValueError: There is no such file, a line of it is bad, or there are
        fewer than 51 speakers.
    """
    del selection
    if not self.table:
      return Drawn()
    name, tokens = vowel_table.read(self.table)
    return Vowels(name, tokens)


class Vowels(ClassSource):
  """Vowels of speakers, of whom the first 50 are for training."""

  classes = CLASSES

  def __init__(self, name: str, tokens: Sequence[Token]):
    """Takes tokens, whose order decides that of the speakers.

    Raises:
      ValueError: There are not enough speakers.
    """
    self.name, self.tokens = name, tuple(tokens)
    speakers = list(dict.fromkeys(token.speaker for token in tokens))
    if len(speakers) <= TRAIN_SPEAKERS:
      raise InputError(
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
    """The vowels of a split, with F1 and F2 in kHz as in 1991."""
    if split not in self._speakers:
      raise unknown('split', split, SPLITS)
    speakers = set(self._speakers[split])
    tokens = [token for token in self.tokens if token.speaker in speakers]
    features = np.array([token.formants for token in tokens], np.float32) / 1000
    return Examples(features, np.array([t.vowel for t in tokens], np.int32))


class Drawn(Vowels):
  """Synthetic speakers, drawn around the means of 1952.

  A formant is the mean of its group and vowel times three lognormal factors:
  one for the speaker (the length of a vocal tract shifts all formants), one for
  the speaker's vowel, and one for the token. Their standard deviations are
  constants of this file.
  """

  def __init__(self, seed: int = 1952):
    """Draws the same speakers for the same seed."""
    rng = np.random.default_rng(seed)
    tokens, speaker = [], 0
    mix = np.array([[1, 0], [CORRELATION, (1 - CORRELATION**2) ** 0.5]])
    for group, count in SPEAKERS.items():
      for _ in range(count):
        speaker += 1
        shift = mix @ rng.standard_normal(2) * OF_SPEAKER
        for vowel, mean in enumerate(MEANS[group]):
          vowel_shift = rng.standard_normal(2) * OF_VOWEL
          for _ in range(REPETITIONS):
            log_factor = shift + vowel_shift + rng.standard_normal(2) * OF_TOKEN
            f1, f2 = (np.array(mean) * np.exp(log_factor)).tolist()
            tokens.append(Token(speaker, vowel, (f1, f2), misheard=False))
    name = 'vowels, drawn around the means of Peterson and Barney 1952'
    super().__init__(name, tokens)
