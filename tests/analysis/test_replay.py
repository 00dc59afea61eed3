"""Replayed steps are the recorded ones, bit for bit, whichever router it is."""

import functools

import numpy as np
import pytest

from moe_jax.analysis import replay
from moe_jax.layers import Dropless
from moe_jax.layers.routers import (
  ExpertChoice,
  Hash,
  Hierarchical,
  NoisyTopK,
  Random,
  Sentence,
  Task,
  TokenChoice,
)
from moe_jax.routing.capacity import All, PerToken
from tests.analysis import recorded_steps as steps
from tests.analysis.recorded_steps import V, batch_of
from tests.models import tiny

E, K = 4, 2
TIGHT = {'capacity': PerToken(1.0)}
LEAKS = {**TIGHT, 'allow_future_leak': True}


def token_choice(**options):
  return {'router': TokenChoice(gates='renormalized', **options)}


WAYS = {
  'token_major': {
    **TIGHT,
    'router': TokenChoice(
      gates='renormalized_after_drop',
      jitter=0.1,
      balance_bias_rate=0.01,
      balance_bias_scores='softmax',
    ),
  },
  'still': {**TIGHT, **token_choice()},
  'batch_priority': {**LEAKS, **token_choice(slot_priority='batch_priority')},
  'threshold': {
    **TIGHT,
    **token_choice(second_policy='threshold', second_threshold=0.9),
  },
  'noisy': {**TIGHT, 'router': NoisyTopK(gates='renormalized')},
  'expert_choice': {**LEAKS, 'router': ExpertChoice(jitter=0.1)},
  'sentence': {
    'capacity': All(),
    'dispatch': Dropless(),
    'allow_future_leak': True,
    'router': Sentence(jitter=0.1),
  },
}


def model_of(way, layers='every 2', num_experts=E, **model):
  moe = dict(num_experts=num_experts, num_selected=K, layers=layers)
  sizes = dict(vocab_size=V, num_layers=4, width=12, ffn={'hidden': 16})
  model = tiny.options({**moe, **WAYS[way]}, **{**sizes, **model})
  return model.build(steps.RULES)


@functools.cache
def recorded(way, microbatches=1):
  return steps.run(model_of(way), microbatches=microbatches)


def assert_same(a, b):
  a, b = tiny.leaves(a), tiny.leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def without_unsent(metrics):
  """Metrics in which what was not sent counts as dropped."""

  def changed(step):
    aux = step.sums.aux
    lost = aux.stats.overflowed + aux.stats.unsent
    stats = aux.stats._replace(overflowed=lost, unsent=0 * lost)
    return step._replace(sums=step.sums._replace(aux=aux._replace(stats=stats)))

  return [changed(step) for step in metrics]


@pytest.mark.slow
@pytest.mark.parametrize(
  'way',
  [
    way
    for way in WAYS
    if way not in ('still', 'switch', 'token_major', 'batch_priority')
  ],
)
def test_three_steps_are_the_recorded_ones_bit_for_bit(way):
  state, metrics, records = recorded(way)
  dropped = sum(step.sums.aux.stats.overflowed.sum() for step in metrics)
  assert (dropped > 0) == (way != 'sentence')
  again, same, _ = steps.run(model_of(way), records)
  assert_same(state, again)
  if way == 'threshold':  # a full expert does not say who was sent to it
    metrics, same = without_unsent(metrics), without_unsent(same)
  assert_same(metrics, same)


@pytest.mark.slow
def test_precisions_are_compared_with_the_routing_held_fixed():
  """A model in bfloat16 makes the choices and drops of one in float32."""
  whole = model_of('token_major')
  half = model_of('token_major', numerics={'dtype': 'bfloat16'})
  batch = batch_of()
  logits, _, choices = steps.forward(whole)(replay.imposed(whole, batch))
  _, _, own = steps.forward(half)(replay.imposed(half, batch))
  record = steps.record(whole, batch, choices)
  given = replay.imposed(half, batch, record)
  rounded, _, again = steps.forward(half)(given)
  kept = []
  for i in whole.sparse_layers:
    np.testing.assert_array_equal(choices[i].expert, again[i].expert)
    np.testing.assert_array_equal(choices[i].kept, again[i].kept)
    kept.append(np.asarray(choices[i].kept).all())
  assert not all(kept)
  assert any((choices[i].expert != own[i].expert).any() for i in own)
  assert 0 < np.abs(np.asarray(logits - rounded)).max() < 0.5


@pytest.mark.slow
def test_layers_in_and_out_of_loops_get_their_own_choices():
  model = model_of('token_major', layers='0,3', scan_layers=True)
  state, metrics, records = steps.run(model, steps=2)
  assert sum(step.sums.aux.stats.overflowed.sum() for step in metrics) > 0
  again, same, _ = steps.run(model, records, steps=2)
  assert_same((state, metrics), (again, same))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['encoder_decoder', 'lstm'])
def test_every_kind_of_model_replays_its_layers(kind):
  """Choices of all sequences go to their own layers, in and out of order."""
  model = model_of('still', kind=kind, layers='1,2')
  batch = batch_of()
  batch = {**batch, **{f'encoder_{k}': v[:, ::-1] for k, v in batch.items()}}
  run = steps.forward(model)
  logits, aux, choices = run(replay.imposed(model, batch))
  records = steps.records(model, batch, choices)
  assert len(records) == len(model.sequences)
  assert sum(len(r.layers) for r in records) == len(model.sparse_layers)
  again, same, _ = run(replay.imposed(model, batch, *records))
  assert_same((logits, aux), (again, same))
  # Choices of other layers give another result.
  turned = [
    r._replace(layers=dict(zip(r.layers, [*r.layers.values()][::-1])))
    for r in records
  ]
  other, _, made = run(replay.imposed(model, batch, *turned))
  assert np.abs(np.asarray(logits - other)).max() > 1e-3
  for before, after in zip(turned, steps.records(model, batch, made)):
    for i in before.layers:
      np.testing.assert_array_equal(
        before.layers[i].expert, after.layers[i].expert
      )


def test_other_choices_than_a_routers_own_change_what_it_computes():
  model = model_of('batch_priority')
  batch, run = batch_of(), steps.forward(model)
  usual, aux, choices = run(replay.imposed(model, batch))
  record = steps.record(model, batch, choices)
  turned = {
    i: own._replace(expert=np.where(own.expert < 0, -1, E - 1 - own.expert))
    for i, own in record.layers.items()
  }
  same, _, again = run(replay.imposed(model, batch, record))
  assert_same((usual, choices), (same, again))
  given = replay.imposed(model, batch, record._replace(layers=turned))
  other, changed, _ = run(given)
  assert np.abs(np.asarray(usual - other)).max() > 1e-2
  load = np.asarray(aux.stats.load)
  np.testing.assert_array_equal(load[..., ::-1], changed.stats.load)
  assert (load[..., ::-1] != load).any()


def test_a_record_of_another_batch_is_refused():
  model = model_of('batch_priority')
  batch = batch_of()
  _, _, choices = steps.forward(model)(replay.imposed(model, batch))
  record = steps.record(model, batch, choices)
  with pytest.raises(ValueError, match='of 48 are others'):
    replay.imposed(model, batch_of(1), record)
  with pytest.raises(ValueError, match=r'\(8, 6\) there, \(4, 6\) here'):
    half = {name: value[:4] for name, value in batch.items()}
    replay.imposed(model, half, record)
  one = record._replace(layers={1: record.layers[1]})
  with pytest.raises(ValueError, match=r'has layers \[1\]; the sparse layers'):
    replay.imposed(model, batch, one)
  with pytest.raises(ValueError, match='no record has the layers'):
    replay.arrays(model, [])
  with pytest.raises(ValueError, match='layer 1: the record has'):
    fewer = model_of('batch_priority', num_experts=2)
    replay.imposed(fewer, batch, record)


def test_a_router_says_whether_it_takes_choices():
  sizes = model_of('batch_priority').moe.sizes
  for way in WAYS:
    assert model_of(way).moe.router.replays(sizes) is None
  for router in (Hash(of='bigram'), Random(), Task()):
    assert router.replays(sizes) is None
  assert 'takes no others' in Hierarchical().replays(sizes)
  with pytest.raises(ValueError, match="replay='x': Hierarchical makes its"):
    tiny.moe_options(router=Hierarchical(), replay='x')
