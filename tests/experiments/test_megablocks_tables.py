"""The rows and drops that follow from known loads."""

import numpy as np

from experiments import megablocks_tables as megablocks
from experiments.study import routing
from moe_jax.analysis.routing_measures import layers_of
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record

# Load of 12 choices among four experts, one of which is idle.
LOAD = np.array([7, 0, 4, 1])


def test_every_way_has_its_rows_and_drops():
  rows_and_drops = megablocks.rows_and_drops(LOAD)
  assert rows_and_drops.keys() == megablocks.WAYS.keys()
  # The fullest expert has 7: 28 rows. With 1.5 slots a choice each has 5.
  np.testing.assert_allclose(rows_and_drops['fullest'], [28 / 12, 0])
  np.testing.assert_allclose(rows_and_drops['slots_1.5'], [20 / 12, 2 / 12])
  np.testing.assert_allclose(rows_and_drops['blocks_8'], [24 / 12, 0])


def test_a_load_is_of_the_real_tokens_of_a_batch():
  expert = np.array([[[2, 0], [2, 1], [0, 1]]])
  documents = np.array([[1, 1, 0]])  # the last token is padding
  choices = LayerChoices(expert, expert / 9, expert > 1)
  record = Record('validation', 0, 0, *[documents] * 3, {5: choices})
  other = record._replace(documents=np.array([[1, 0, 0]]))
  header = Header({5: LayerInfo(4, 2)}, vocab_size=2)
  layer = layers_of(header, [record, other])[5]
  np.testing.assert_array_equal(
    routing.loads(layer, 3), [[1, 1, 2, 0], [1, 0, 1, 0]]
  )
