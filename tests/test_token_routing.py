"""Measures of routing, on choices for which they are known."""

import numpy as np

from experiments import openmoe_routing
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.routing.capacity import Fixed


def record(expert, tokens, step: int = 0) -> Record:
  """A record of one layer, numbered 1, whose choices [B, T, K] are all kept."""
  expert = np.array(expert, np.int32)
  B, T = expert.shape[:2]
  kept = np.ones(expert.shape, bool)
  return Record(
    'validation',
    step,
    0,
    tokens=np.array(tokens, np.int32),
    positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    documents=np.ones((B, T), np.int32),
    layers={1: LayerChoices(expert, kept / 2, kept)},
  )


def header(num_experts: int, num_selected: int = 1) -> Header:
  return Header({1: LayerInfo(num_experts, num_selected)}, vocab_size=9)


def test_context_is_what_the_label_adds_to_the_known_one():
  rng = np.random.default_rng(0)
  known_label, label = rng.integers(0, 2, (2, 4000))
  # The known label decides; nothing is left to add.
  info = openmoe_routing.where_known(known_label, label, known_label, rng)
  assert abs(info.net) < 1e-9
  # The expert is their parity, which neither label tells alone: all of ln 2.
  info = openmoe_routing.where_known(
    known_label ^ label, label, known_label, rng
  )
  np.testing.assert_allclose(info.fraction, 1, atol=0.01)
  # Neither label decides: chance is taken off, although pairs are many.
  many_labels = rng.integers(0, 200, 4000)
  expert = rng.integers(0, 5, 4000)
  info = openmoe_routing.where_known(expert, many_labels, known_label, rng)
  assert info.mutual > 0.05 and abs(info.fraction) < 0.02


def test_favourites_and_changes_are_told():
  # Token 7 is with expert 2 from the second of five checkpoints on. Token 4 is
  # half as frequent, and is with expert 0 at the end alone.
  tokens = [[7, 4, 7]]
  choices = {
    0: [[[0], [1], [0]]],
    10: [[[2], [1], [2]]],
    20: [[[2], [1], [2]]],
    50: [[[2], [2], [2]]],
    100: [[[2], [0], [2]]],
  }
  history = {s: [record(e, tokens, s)] for s, e in choices.items()}
  metrics = openmoe_routing.changes(header(3), history)[1]
  shares = [metrics[f'agreement_{share}'] for share in openmoe_routing.EARLY]
  np.testing.assert_allclose(shares, [0, 2 / 3, 2 / 3, 2 / 3])
  # No token changed from step 10 to 20, and one of three to 50 and to 100.
  np.testing.assert_allclose(metrics['churn_early'], 1 / 6)
  np.testing.assert_allclose(metrics['churn_late'], 1 / 3)
  np.testing.assert_allclose(metrics['churn_ends'], -1 / 6)


def test_random_order_drops_as_many_but_no_later_ones():
  # All tokens want expert 0, which has 3 slots in a row of 12.
  moe = MoeOptions(num_experts=5, capacity=Fixed(slots=3))
  expert = np.zeros((400, 12, 1), np.int32)
  real = np.ones((400, 12), bool)
  real[:, -1] = False
  rng = np.random.default_rng(0)
  kept = openmoe_routing.in_random_order(expert, real, moe, rng)
  assert not kept[:, -1].any()  # padding takes no slot
  np.testing.assert_array_equal(kept.sum((1, 2)), 3)
  served = kept[:, :-1].mean(0)
  np.testing.assert_allclose(served, 3 / 11, atol=0.1)
  assert len(np.unique(kept[..., 0], axis=0)) > 100  # each row has its own
