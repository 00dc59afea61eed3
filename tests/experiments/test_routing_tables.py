"""Measures of recorded routing, on choices for which they are known."""

import numpy as np
import pytest

from experiments import (
  megablocks_tables,
  merge_or_prune,
  openmoe_routing,
  specialisation,
)
from experiments.study import routing
from moe_jax.analysis.routing_measures import layers_of
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record
from moe_jax.compression import merge
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.routing.capacity import Fixed
from tests.compression import sparse_runs


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


def header(num_experts, num_selected=1, vocab_size=9, **options) -> Header:
  layers = {1: LayerInfo(num_experts, num_selected)}
  return Header(layers, vocab_size=vocab_size, **options)


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


def test_choices_that_follow_the_kind_of_character():
  # Letters go to expert 0, commas and digits to 1, other ids to 2, in rows of
  # two sources that have as much of each.
  rng = np.random.default_rng(0)
  letters = np.frombuffer(b'abcxyz', np.uint8).astype(np.int32)
  tokens = rng.choice([*letters, ord(','), ord('7'), 300], (40, 50))
  expert = np.where(
    tokens == 300, 2, (tokens == ord(',')) | (tokens == ord('7'))
  )
  sources = np.int32(np.arange(40)[:, None] % 2 + 0 * tokens)
  mixed = record(expert[..., None], tokens)._replace(sources=sources)
  sizes = header(3, vocab_size=301, sources=('a', 'b'))
  layers = layers_of(sizes, [mixed])
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


# Load of 12 choices among four experts, one of which is idle.
LOAD = np.array([7, 0, 4, 1])


def test_every_way_has_its_rows_and_drops():
  rows_and_drops = megablocks_tables.rows_and_drops(LOAD)
  assert rows_and_drops.keys() == megablocks_tables.WAYS.keys()
  # The fullest expert has 7: 28 rows. With 1.5 slots a choice each has 5.
  np.testing.assert_allclose(rows_and_drops['fullest'], [28 / 12, 0])
  np.testing.assert_allclose(rows_and_drops['slots_1.5'], [20 / 12, 2 / 12])
  np.testing.assert_allclose(rows_and_drops['blocks_8'], [24 / 12, 0])


def test_a_load_is_of_the_real_tokens_of_a_batch():
  expert = np.array([[[2, 0], [2, 1], [0, 1]]])
  padded = [  # behind the first two tokens, and behind the first
    record(expert, [[1, 1, 1]])._replace(documents=np.array([documents]))
    for documents in ([1, 1, 0], [1, 0, 0])
  ]
  layer = layers_of(header(4, 2), padded)[1]
  np.testing.assert_array_equal(
    routing.loads(layer, 3), [[1, 1, 2, 0], [1, 0, 1, 0]]
  )


def test_merged_experts_in_the_whole_model_are_the_merged_model(monkeypatch):
  monkeypatch.setattr(merge_or_prune, 'EXPERTS', sparse_runs.E)
  run = sparse_runs.run_of()
  layers = merge.merge(sparse_runs.calibrated(run), {1: 3, 2: 2})
  model, variables = merge_or_prune.with_layers(run, layers)
  assert model == run.model
  whole = run._replace(variables=variables)
  for n in layers:
    y, _ = sparse_runs.outputs(whole, n)
    merged = sparse_runs.outputs(sparse_runs.smaller_run(run, layers), n)
    np.testing.assert_allclose(y, merged[0], atol=1e-6)
    assert np.abs(y - sparse_runs.outputs(run, n)[0]).max() > 1e-3


def test_experts_are_compared_by_the_logits_of_tokens(monkeypatch):
  monkeypatch.setattr(merge_or_prune, 'EXPERTS', sparse_runs.E)
  run, batches = sparse_runs.run_of(), sparse_runs.BATCHES
  rng = np.random.default_rng(0)
  sources = merge_or_prune.compared_by(run, batches, rng)
  own = sources[''].usage[1]
  by_logits = sources[merge_or_prune.LOGITS].usage[1].output
  tokens = sum(batch['tokens'].size for batch in batches)
  assert by_logits.shape == (sparse_runs.E, tokens)
  np.testing.assert_allclose(np.linalg.norm(by_logits, axis=1), 1, rtol=1e-5)
  # Chance keeps what merging weights experts by, and mixes whose outputs are
  # whose.
  mixed = sources[merge_or_prune.RANDOM].usage[1]
  np.testing.assert_array_equal(mixed.choices, own.choices)
  order = [own.gate.tolist().index(gate) for gate in mixed.gate]
  assert sorted(order) == [*range(sparse_runs.E)] != order
  np.testing.assert_array_equal(mixed.output, own.output[order])
