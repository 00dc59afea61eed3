"""Numbers of the routing report, computed by hand, and counts by a loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import routing_report
from moe_jax.analysis.routing_report import count_tokens
from moe_jax.layers import MoeOptions
from moe_jax.layers.routers import ExpertChoice
from moe_jax.models import Layer, LayerStack, Model, Stacks
from moe_jax.models.recorded import recording
from moe_jax.routing.capacity import All, Fixed
from moe_jax.routing.stats import (
  MoeAux,
  RoutingStats,
  load_summary,
  no_exchange,
)  # fmt: skip
from moe_jax.runs.summary import LossSums
from tests import own_kinds
from tests.models import oracle, tiny
from tests.models.tiny import V

# Counts of four tokens and three experts; token 2 does not occur, and expert 2
# gets no token.
COUNTS = np.array([[6, 2, 0], [6, 0, 0], [0, 0, 0], [1, 5, 0]])
NAMES = [' ', '|', 'never seen', '[b]`x']


class Layers(Model):
  """A model of dense layers and one sparse one, number 3."""

  moe = MoeOptions(num_experts=3, num_selected=2)
  stacks = Stacks([LayerStack((*[Layer()] * 3, Layer(moe)))])


def report(names=NAMES, counts=COUNTS, **changes):
  """The report on 10 tokens with two choices each."""
  stats = {
    'tokens': 10.0,
    'load': counts.sum(axis=0),  # [13, 7, 0]
    'kept_load': np.array([9, 7, 0]),
    'overflowed': np.array([1, 3]),
    'unsent': np.zeros(2),
    'entropy': 5 * math.log(3),
    'logit_square': 15.625,
  }
  # Other layers are dense: their sums are zeros.
  stats = RoutingStats(**stats | changes)
  sums = jax.tree.map(
    lambda x: np.stack([np.zeros_like(x, np.float64)] * 3 + [np.float64(x)]),
    stats,
  )
  zero = np.zeros(())
  exchange = jax.tree.map(lambda x: np.zeros(4), no_exchange())
  sums = LossSums(zero, zero, zero, MoeAux({}, sums, exchange))
  return routing_report.tables(sums, Layers(), {3: counts}, names.__getitem__)


def test_load_summary_by_hand():
  # The mean is 2, and deviations of 2, 0, -1, -1 have a variance of 6/4.
  summary = load_summary(np.array([4, 2, 1, 1]))
  assert summary['load_cv'] == pytest.approx(math.sqrt(1.5) / 2)
  assert summary['load_max_over_mean'] == 2.0
  assert summary['unused_experts'] == 0
  undefined = load_summary(np.zeros(3))
  assert math.isnan(undefined['load_cv'])
  assert math.isnan(undefined['load_max_over_mean'])
  assert undefined['unused_experts'] == 3


def test_tables_by_hand():
  layers, busiest = report()
  (row,) = layers.rows
  assert row == {
    'layer': 3,
    'dropped': 0.2,
    'choice 1': 0.1,
    'choice 2': 0.3,
    # The mean is 20/3; deviations 19/3, 1/3, -20/3 have a variance of 762/27.
    'load max / mean': pytest.approx(1.95),
    'load CV': pytest.approx(math.sqrt(762 / 27) / (20 / 3)),
    'entropy (nats)': pytest.approx(math.log(3) / 2),
    'entropy / ln E': pytest.approx(0.5),
    'logit RMS': 1.25,
    'unused experts': '1 of 3',
  }
  # Expert 2 got no token and is not listed, and neither are tokens without an
  # expert. Tokens 0 and 1 tie at 6: the lower id comes first. Blanks in a
  # token's name are shown, and a backtick does not end its code span.
  assert [[*row.values()] for row in busiest.rows] == [
    [3, 0, 0.65, '`␣` 75%, `|` 100%, `` [b]`x `` 17%'],
    [3, 1, 0.35, '`` [b]`x `` 83%, `␣` 25%'],
  ]


def markdown(tables, folder, warning=''):
  routing_report.write_report(folder, tables, warning)
  return (folder / 'routing_report.md').read_text()


def test_the_report_has_warnings_and_visible_names(tmp_path):
  text = markdown(report(), tmp_path, 'it is forced')
  assert '**Warning:** it is forced.' in text
  text = markdown(report(['\n', '', '\x00é', 'a b']), tmp_path)
  assert 'Warning' not in text
  for name in (r'`\n` 75%', "`''` 100%", '`a␣b` 17%'):
    assert name in text
  # A bar does not end its cell.
  assert r'`\|` 100%' in markdown(report(), tmp_path)


def counted(model, *batches):
  """The counts of a model that is not trained."""
  counts, params = {}, tiny.params_of(model)
  for batch in batches:
    _, choices = recording(model, {'params': params}, **model.inputs(batch))
    count_tokens(counts, model, batch, choices)
  return counts


DOCUMENTS = [[(0, 6), (6, 10)], [(0, 3)], [(0, 10)]]  # documents of each row


def make_batch(seed=0):
  tokens = tiny.tokens(seed)
  segment_ids, positions = np.zeros((2, *tokens.shape), np.int32)
  for row, documents in enumerate(DOCUMENTS):
    for i, (start, stop) in enumerate(documents):
      segment_ids[row, start:stop] = i + 1
      positions[row, start:stop] = np.arange(stop - start)
  batch = {'tokens': tokens, 'segment_ids': segment_ids, 'positions': positions}
  return jax.tree.map(jnp.asarray, batch)


def real_counts(batch):
  real = np.asarray(batch['segment_ids']) > 0
  return np.bincount(np.asarray(batch['tokens'])[real], minlength=V)


def test_counts_equal_a_slow_loop():
  # Groups span rows, and the last of them is incomplete.
  moe = dict(layers='1,2,4,5', capacity=All(), group_size=20)
  options = tiny.options(moe, num_layers=6, ffn=dict(activation='relu'))
  model = options.build()
  params, batches = tiny.params_of(model), [make_batch(0), make_batch(1)]
  expected = {i: np.zeros((V, 5), int) for i in (1, 2, 4, 5)}
  for batch in batches:
    for row, documents in enumerate(DOCUMENTS):
      for start, stop in documents:
        tokens = np.asarray(batch['tokens'])[row, start:stop]
        _, expert_index = oracle.decode(options, params, tokens)
        for i, counts in expected.items():
          for token, experts in zip(tokens, expert_index[i]):
            np.add.at(counts, (token, experts), 1)
  counts = counted(model, *batches)
  assert counts.keys() == expected.keys()
  for i in expected:
    np.testing.assert_array_equal(counts[i], expected[i])


def test_where_experts_choose_it_counts_whom_they_took():
  moe = dict(router=ExpertChoice(), capacity=Fixed(slots=3), group_size=20)
  batch = make_batch()
  model = tiny.build(moe | dict(allow_future_leak=True))
  counts = counted(model, batch)
  # In each group of 20 tokens an expert takes ceil(3 * 13 / 20) = 2 of the 13
  # real ones, or ceil(3 * 10 / 20) = 2 where 10 are real.
  np.testing.assert_array_equal(counts[0].sum(0), [4] * 5)
  assert (counts[0] <= real_counts(batch)[:, None]).all()


def test_experts_that_mix_tokens_take_all_real_ones():
  soft = {'moe': {'router': {'kind': 'soft'}, 'dispatch': {'kind': 'einsum'}}}
  model = tiny.build(
    dict(layers='last 1', capacity=All()),
    kind='encoder_decoder',
    encoder=dict(num_layers=1, overrides=soft),
  )
  batch = make_batch()
  batch |= {f'encoder_{name}': values for name, values in batch.items()}
  expected = np.tile(real_counts(batch)[:, None], (1, 5))
  np.testing.assert_array_equal(counted(model, batch)[0], expected)


def test_a_router_that_sows_nothing_is_counted_before_drops():
  router = own_kinds.InTurn(first=3)
  moe = dict(router=router, num_selected=1, capacity=Fixed(slots=1))
  batch = make_batch()
  expected = np.zeros((V, 5), int)
  for row, position in np.argwhere(np.asarray(batch['segment_ids']) > 0):
    expected[batch['tokens'][row, position], (position + 3) % 5] += 1
  counts = counted(tiny.build(moe), batch)
  for layer in (0, 1):
    np.testing.assert_array_equal(counts[layer], expected)
