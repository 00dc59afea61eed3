"""Vowels of 1952: formats of the table, and simulated speakers."""

import numpy as np
import pytest

from moe_jax.data import VowelsSource
from moe_jax.data.sources import vowels
from moe_jax.data.sources.contract import SPLITS

# A man's vowels [i], twice, and [ah] once, as in the file; [E] of 'head' is not
# among the four classes.
ONES = [
  ('m', 1, 1, 'iy', 160, 240, 2280, 2850),
  ('m', 1, 1, '*iy', 186, 280, 2400, 2790),
  ('m', 1, 3, 'eh', 160, 500, 1800, 2500),
  ('m', 1, 5, 'ah', 155, 620, 1200, 2550),
]


def table(speakers=52):
  """Returns lines of a table in which all speakers have equal vowels."""
  return [(a, n + 1, *rest) for n in range(speakers) for a, _, *rest in ONES]


def write_table(path, lines):
  path.write_text('\n'.join(' '.join(map(str, line)) for line in lines))
  return VowelsSource(str(path))


def test_a_table_is_read(tmp_path):
  source = write_table(tmp_path / 'pb.data', table()).classes()
  train, validation = (source.examples(s) for s in ('train', 'validation'))
  # The first 50 of 52 speakers are for training; each has three vowels of the
  # four classes.
  assert len(train.labels) == 150 and len(validation.labels) == 6
  np.testing.assert_allclose(
    validation.features[:3], [[0.24, 2.28], [0.28, 2.4], [0.62, 1.2]]
  )
  assert validation.labels[:3].tolist() == [0, 0, 3]
  assert source.classes == ('i', 'I', 'a', 'A')
  assert [token.misheard for token in source.tokens[:3]] == [False, True, False]


def test_forms_of_the_table_say_the_same(tmp_path):
  plain = write_table(tmp_path / 'a', table()).classes()
  # This file has a header and a column for the sex.
  lines = [['#', 'Peterson', 'and', 'Barney']]
  lines += [(group, 'm', *rest) for group, *rest in table()]
  source_with_sex = write_table(tmp_path / 'b', lines).classes()
  # Praat and other programs write a header with such names.
  rows = [('Type', 'Sex', 'Speaker', 'Vowel', 'IPA', 'F0', 'F1', 'F2', 'F3')]
  rows += [(g, 'm', s, v.strip('*'), 'x', *f) for g, s, _, v, *f in table()]
  for delimiter in ('\t', ','):
    text = '\n'.join(delimiter.join(map(str, line)) for line in rows)
    path = tmp_path / 'c'
    path.write_text(text + '\n')
    for source in (source_with_sex, VowelsSource(str(path)).classes()):
      for split in SPLITS:
        for array, plain_array in zip(
          source.examples(split), plain.examples(split), strict=True
        ):
          np.testing.assert_array_equal(array, plain_array)


def table_with(column, value):
  lines = [list(line) for line in table()]
  lines[5][column] = value
  return lines


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    (table_with(5, 'x'), 'line 6: .*could not convert'),
    (table_with(6, 0), 'line 6: .*F2=0 Hz are not above 0'),
    (table_with(3, 'zz'), "line 6: .*unknown phoneme 'zz'"),
    (table(50), '50 speakers; 50 are to train on and at least one'),
    ([('m', 1, 'iy')], 'line 1: .*is not group, speaker'),
    ([('Speaker', 'Vowel', 'F1'), (1, 'iy', 3)], "unknown column.*'f2'"),
    ([], '0 speakers'),
  ],
)
def test_a_bad_table_is_refused(lines, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    write_table(tmp_path / 'bad', lines).classes()


def test_a_missing_table_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'table of vowels: no file .*none'):
    VowelsSource(f'{tmp_path}/none').classes()


def test_drawn_speakers_say_that_they_are():
  source = VowelsSource().classes()
  assert 'drawn' in source.name
  assert len(source.examples('train').labels) == 50 * 4 * 2
  assert len(source.examples('validation').labels) == 25 * 4 * 2
  again = VowelsSource().classes().examples('train')
  np.testing.assert_array_equal(
    source.examples('train').features, again.features
  )


def formants(group, draws=40):
  """Returns formants of simulated studies, [speakers, vowels, repeats, 2]."""
  first, counts = 0, list(vowels.SPEAKERS.items())
  for name, count in counts:
    if name == group:
      break
    first += count
  samples = []
  for seed in range(draws):
    tokens = vowels.Drawn(seed).tokens
    values = np.array([t.formants for t in tokens]).reshape(75, 4, 2, 2)
    samples.append(values[first : first + count])
  return np.concatenate(samples)


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
