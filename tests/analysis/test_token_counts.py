"""Token counts of a model equal a slow loop over its choices in numpy."""

import numpy as np
import pytest

from moe_jax.analysis.token_counts import choices, token_counts
from moe_jax.layers.routers import ExpertChoice
from moe_jax.routing.capacity import All, Fixed
from tests import own_kinds
from tests.models import oracle, tiny
from tests.models.tiny import B, T, V

# Models by pattern: L, the sparse layers, other options. They are a period that
# is the whole model, and two sparse layers of three.
CASES = {
  'last 1': (3, [2], dict(scan_layers=False)),
  '1,2,4,5': (6, [1, 2, 4, 5], dict(remat='full')),
}
DOCUMENTS = [[(0, 6), (6, 10)], [(0, 3)], [(0, 10)]]  # documents of each row


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
  moe = dict(layers=layers, capacity=All(), group_size=2 * T)
  options = tiny.options(
    moe, num_layers=num_layers, ffn=dict(activation='relu'), **options
  )
  model = options.build()
  params = tiny.params_of(model)
  batches = [make_batch(0), make_batch(1)]
  expected = {i: np.zeros((V, 5), int) for i in sparse}
  for batch in batches:
    for row, documents in enumerate(DOCUMENTS):
      for start, stop in documents:
        tokens = batch['tokens'][row, start:stop]
        _, expert_index = oracle.decode(options, params, tokens)
        for i in sparse:
          for token, experts in zip(tokens, expert_index[i]):
            for e in experts:
              expected[i][token, e] += 1
  counts = token_counts(model, {'params': params}, batches)
  assert list(counts) == sparse
  for i in sparse:
    assert counts[i].sum() == 2 * 2 * (10 + 3 + 10)
    np.testing.assert_array_equal(counts[i], expected[i])


def test_where_experts_choose_it_counts_whom_they_took():
  moe = dict(
    router=ExpertChoice(),
    allow_future_leak=True,
    capacity=All(),  # every expert takes every real token
    group_size=2 * T,
  )
  model = tiny.build(moe)
  batch = make_batch(0)
  variables = {'params': tiny.params_of(model)}
  counts = token_counts(model, variables, [batch])
  real = np.bincount(batch['tokens'][batch['segment_ids'] > 0], minlength=V)
  for i in (0, 1):
    np.testing.assert_array_equal(counts[i], np.tile(real[:, None], (1, 5)))
  fixed_model = tiny.build(moe | dict(capacity=Fixed(slots=3)))
  counts = token_counts(fixed_model, variables, [batch])
  # In each group of 20 tokens an expert takes ceil(3 * 13 / 20) = 2 of the 13
  # real ones, or ceil(3 * 10 / 20) = 2 where 10 are real.
  np.testing.assert_array_equal(counts[0].sum(0), [4] * 5)
  assert (counts[0] <= real[:, None]).all() and np.ptp(counts[0]) > 0


def test_experts_that_mix_tokens_take_all_real_ones():
  encoder = {
    'moe': {'router': {'kind': 'soft'}, 'dispatch': {'kind': 'einsum'}}
  }
  model = tiny.build(
    dict(layers='last 1', capacity=All()),
    kind='encoder_decoder',
    encoder=dict(num_layers=1, overrides=encoder),
  )
  batch = make_batch(0)
  batch |= {f'encoder_{name}': values for name, values in batch.items()}
  counts = token_counts(model, {'params': tiny.params_of(model)}, [batch])
  real = np.bincount(batch['tokens'][batch['segment_ids'] > 0], minlength=V)
  np.testing.assert_array_equal(counts[0], np.tile(real[:, None], (1, 5)))


def test_a_router_that_sows_nothing_is_counted_before_drops():
  router = own_kinds.InTurn(first=3)
  moe = dict(router=router, num_selected=1, capacity=Fixed(slots=1))
  model, batch = tiny.build(moe), make_batch(0)
  counts = token_counts(model, {'params': tiny.params_of(model)}, [batch])
  expected = np.zeros((V, 5), int)
  for row, position in np.argwhere(batch['segment_ids'] > 0):
    expected[batch['tokens'][row, position], (position + 3) % 5] += 1
  for layer in (0, 1):
    np.testing.assert_array_equal(counts[layer], expected)


def test_a_dense_model_has_none():
  model = tiny.build(moe=dict(num_experts=0))
  assert token_counts(model, {'params': {}}, [make_batch(0)]) == {}


def test_choices_say_where_each_token_stands():
  model, batch = tiny.build(dict(group_size=2 * T)), make_batch(0)
  variables = {'params': tiny.params_of(model)}
  (by_layer,) = choices(model, variables, [batch])
  real = np.flatnonzero(batch['segment_ids'])
  for layer in (0, 1):
    position, token, expert = by_layer[layer]
    # Every real token chooses two experts, and padding none.
    np.testing.assert_array_equal(np.sort(position), np.repeat(real, 2))
    np.testing.assert_array_equal(token, batch['tokens'].reshape(-1)[position])
    assert len(set(zip(position, expert))) == 2 * len(real)


def test_a_dense_model_has_batches_without_choices():
  model = tiny.build(moe=dict(num_experts=0))
  variables = {'params': tiny.params_of(model)}
  assert list(choices(model, variables, [make_batch(0)] * 2)) == [{}, {}]
