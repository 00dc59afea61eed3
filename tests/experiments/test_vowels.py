"""Vowels of 1952: the table, and simulated speakers."""

import numpy as np
import pytest

from experiments.origins_1991 import vowels

HEADER = ('Type', 'Sex', 'Speaker', 'Vowel', 'IPA', 'F0', 'F1', 'F2', 'F3')
# A man's vowels [i], twice, and [ah] once, as in the file; [E] of 'head' is not
# among the four classes.
ONES = [
  ('iy', 160, 240, 2280, 2850),
  ('*iy', 186, 280, 2400, 2790),
  ('eh', 160, 500, 1800, 2500),
  ('ah', 155, 620, 1200, 2550),
]


def table(speakers=52):
  """Returns lines of a table in which all speakers have equal vowels."""
  return [
    ('m', 'm', n + 1, vowel, 'x', *formants)
    for n in range(speakers)
    for vowel, *formants in ONES
  ]


def read(folder, lines, header=HEADER):
  text = '\n'.join('\t'.join(map(str, line)) for line in (header, *lines))
  (folder / 'table.tsv').write_text(text + '\n')
  return vowels.load(f'{folder}/table.tsv')


def test_a_table_is_read(tmp_path):
  train, test = read(tmp_path, table())
  # The first 50 of 52 speakers are for training; each has three vowels of the
  # four classes.
  assert len(train.labels) == 150 and len(test.labels) == 6
  np.testing.assert_allclose(
    test.features[:3], [[0.24, 2.28], [0.28, 2.4], [0.62, 1.2]]
  )
  assert test.labels[:3].tolist() == [0, 0, 3]


@pytest.mark.parametrize(
  ('column', 'value', 'message'),
  [
    (6, 'x', 'line 7: .*could not convert'),
    (7, 0, 'line 7: .*no formants'),
    (3, 'zz', 'line 7: .*no vowel of'),
  ],
)
def test_a_bad_table_is_refused(column, value, message, tmp_path):
  lines = [list(line) for line in table()]
  lines[5][column] = value
  with pytest.raises(ValueError, match=message):
    read(tmp_path, lines)


def test_drawn_speakers_are_the_same_at_every_call():
  train, test = vowels.load()
  assert (len(train.labels), len(test.labels)) == (50 * 4 * 2, 25 * 4 * 2)
  np.testing.assert_array_equal(train.features, vowels.load()[0].features)
  # The stored results are of these speakers.
  assert vowels.digest((train, test)).startswith('de2a21f08002')


def formants(group, draws=40):
  """Returns formants of simulated studies, [speakers, vowels, repeats, 2]."""
  names = list(vowels.SPEAKERS)
  first = sum(vowels.SPEAKERS[name] for name in names[: names.index(group)])
  own = slice(first, first + vowels.SPEAKERS[group])
  tokens = [np.array(vowels.drawn(seed))[:, 2:] for seed in range(draws)]
  return np.concatenate([t.reshape(75, 4, 2, 2)[own] for t in tokens])


@pytest.mark.parametrize('group', sorted(vowels.SPEAKERS))
def test_drawn_vowels_have_the_published_means_and_the_stated_spreads(group):
  samples = formants(group)
  # The mean of a lognormal with so small a spread lies half a per cent above
  # its median; the mean over 40 x 14 children is known to half a per cent.
  mean = samples.mean((0, 2))
  np.testing.assert_allclose(mean, vowels.MEANS[group], rtol=0.02)
  logs = np.log(samples)
  token_spread = (logs[:, :, 0] - logs[:, :, 1]).std((0, 1)) / 2**0.5
  np.testing.assert_allclose(token_spread, vowels.OF_TOKEN, rtol=0.06)
  variances = np.square(
    [*zip(vowels.OF_SPEAKER, vowels.OF_VOWEL, vowels.OF_TOKEN)]
  )
  np.testing.assert_allclose(
    logs.std((0, 2)), [np.sqrt(variances.sum(1))] * 4, rtol=0.08
  )
  # The covariance of a speaker's different vowels is the speaker's own
  # variance.
  speaker_spread = np.cov(logs[:, 0, 0, 0], logs[:, 3, 0, 0])[0, 1] ** 0.5
  np.testing.assert_allclose(speaker_spread, vowels.OF_SPEAKER[0], rtol=0.15)
