"""Token counts against a slow loop over a numpy model's choices."""

import numpy as np
import pytest

from moe_jax.analysis.token_counts import token_counts
from tests.models import oracle, tiny
from tests.models.tiny import B, T, V

# layers: (L, the sparse ones, other options). A period of two, one that is the
# whole model, and one with two sparse layers of three.
CASES = {
  'every 2': (4, [1, 3], dict(remat='full')),
  'last 1': (3, [2], dict(scan_layers=False)),
  '1,2,4,5': (6, [1, 2, 4, 5], dict()),
}
DOCUMENTS = [[(0, 6), (6, 10)], [(0, 3)], [(0, 10)]]  # of each row


def make_batch(seed):
  batch = {
    'tokens': tiny.tokens(seed),
    'segment_ids': np.zeros((B, T), np.int32),
    'positions': np.zeros((B, T), np.int32),
  }
  for row, documents in enumerate(DOCUMENTS):
    for i, (start, stop) in enumerate(documents):
      batch['segment_ids'][row, start:stop] = i + 1
      batch['positions'][row, start:stop] = np.arange(stop - start)
  return batch


@pytest.mark.parametrize('layers', CASES)
def test_counts_equal_a_slow_loop(layers):
  num_layers, sparse, options = CASES[layers]
  # Groups span rows, and the last of them is incomplete.
  moe = dict(layers=layers, capacity_rule='all', group_size=2 * T)
  options = dict(num_layers=num_layers, activation='relu', **options)
  config, model = tiny.config(moe, **options), tiny.build(moe, **options)
  params = tiny.params_of(model)
  batches = [make_batch(0), make_batch(1)]
  expected = {i: np.zeros((V, 5), int) for i in sparse}
  for batch in batches:
    for row, documents in enumerate(DOCUMENTS):
      for start, stop in documents:
        tokens = batch['tokens'][row, start:stop]
        _, choices = oracle.decode(config, params, tokens)
        for i in sparse:
          for token, experts in zip(tokens, choices[i]):
            for e in experts:
              expected[i][token, e] += 1
  counts = token_counts(model, {'params': params}, batches)
  assert list(counts) == sparse
  for i in sparse:
    assert counts[i].sum() == 2 * 2 * (10 + 3 + 10)
    np.testing.assert_array_equal(counts[i], expected[i])


def test_where_experts_choose_it_counts_whom_they_took():
  moe = dict(
    router='expert_choice',
    gates='raw',
    allow_future_leak=True,
    capacity_rule='all',  # every expert takes every real token
    group_size=2 * T,
  )
  model = tiny.build(moe)
  batch = make_batch(0)
  variables = {'params': tiny.params_of(model)}
  counts = token_counts(model, variables, [batch])
  real = np.bincount(batch['tokens'][batch['segment_ids'] > 0], minlength=V)
  for i in (0, 1):
    np.testing.assert_array_equal(counts[i], np.tile(real[:, None], (1, 5)))
  few = tiny.build(moe | dict(capacity_rule='fixed', capacity_slots=3))
  counts = token_counts(few, variables, [batch])
  # Of 13 of 20 real tokens two, of 10 of 20 (half of the group is its own) two.
  np.testing.assert_array_equal(counts[0].sum(0), [4] * 5)
  assert (counts[0] <= real[:, None]).all() and np.ptp(counts[0]) > 0


def test_a_dense_model_has_none():
  model = tiny.build(moe=dict(num_experts=0))
  assert token_counts(model, {'params': {}}, [make_batch(0)]) == {}
