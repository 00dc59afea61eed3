"""Information of first choices about kinds of characters and about sources."""

import numpy as np
import pytest

from experiments import openmoe_routing, specialisation
from moe_jax.analysis.routing_measures import layers_of
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record


def test_choices_that_follow_the_kind_of_character():
  # Letters go to expert 0, commas and digits to 1, other ids to 2, in rows of
  # two sources that have as much of each.
  rng = np.random.default_rng(0)
  letters = np.frombuffer(b'abcxyz', np.uint8).astype(np.int32)
  tokens = rng.choice([*letters, ord(','), ord('7'), 300], (40, 50))
  expert = np.where(
    tokens == 300, 2, (tokens == ord(',')) | (tokens == ord('7'))
  )
  expert = expert.astype(np.int32)[..., None]
  kept = np.ones(expert.shape, bool)
  rows = np.ones(tokens.shape, np.int32)
  record = Record(
    'validation',
    0,
    0,
    tokens=tokens.astype(np.int32),
    positions=np.cumsum(rows, 1) - 1,
    documents=rows,
    sources=np.arange(40, dtype=np.int32)[:, None] % 2 * rows,
    layers={1: LayerChoices(expert, kept / 2, kept)},
  )
  header = Header({1: LayerInfo(3, 1)}, vocab_size=301, sources=('a', 'b'))
  layers = layers_of(header, [record])
  info = specialisation.layer_information(layers)[1]
  np.testing.assert_allclose([info['kind'], info['token']], 1, atol=0.02)
  np.testing.assert_allclose([info['source'], info['position']], 0, atol=0.02)
  # All commas have one expert, all tokens three.
  shares = np.bincount(expert.ravel()) / expert.size
  np.testing.assert_allclose(
    info['punctuation'], -(shares * np.log(shares)).sum()
  )
  np.testing.assert_allclose(
    info['token_less_source'], info['token'] - info['source']
  )


@pytest.mark.parametrize('study', [specialisation, openmoe_routing])
@pytest.mark.parametrize('steps', [11, 128, 300])
def test_the_first_checkpoint_is_still_there_at_the_end(study, steps):
  # What is measured early in the run would otherwise be of a later step.
  options = study.config(steps).checkpoint
  saved = {*range(options.every_steps, steps + 1, options.every_steps), steps}
  assert len(saved) <= options.keep_newest
