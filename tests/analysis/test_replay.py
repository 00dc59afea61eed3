"""Replayed steps are the recorded ones, bit for bit, whichever router it is."""

import numpy as np
import pytest

from moe_jax.analysis import replay
from moe_jax.layers import routers
from moe_jax.layers.routers import Hierarchical, Sizes, TokenChoice
from moe_jax.routing.capacity import All, PerToken
from tests.analysis import recorded_steps as steps
from tests.analysis.recorded_steps import V, batch_of
from tests.models import tiny

E, K = 4, 2
TIGHT = {'capacity': PerToken(1.0)}
LEAKS = {**TIGHT, 'allow_future_leak': True}
ROOMY = {'capacity': All(), 'allow_future_leak': True}
SIZES = Sizes(E, K, PerToken(1.0))


def token_choice(**options):
  return {'router': TokenChoice(gates='renormalized', **options)}


BIASED = dict(balance_bias_rate=0.01, balance_bias_scores='softmax')
NOISY = TokenChoice(gates='renormalized_after_drop', jitter=0.1, **BIASED)
ROUTERS = {
  'token_major': {**TIGHT, 'router': NOISY},
  'still': {**TIGHT, **token_choice()},
  'batch_priority': {**LEAKS, **token_choice(slot_priority='batch_priority')},
}


# All others that take choices, with the options that they have by default.
for kind, router in routers.ROUTERS.builtin.items():
  if router.takes_choices and router is not TokenChoice:
    roomy = any(router().problems_with(SIZES))
    ROUTERS[kind] = {**(ROOMY if roomy else LEAKS), 'router': router()}


def model_of(name, layers='every 2', num_experts=E, **model):
  moe = dict(num_experts=num_experts, num_selected=K, layers=layers)
  if 'task_ids' in ROUTERS[name]['router'].reads:
    model['num_tasks'] = 3
  sizes = dict(vocab_size=V, num_layers=4, width=12, ffn={'hidden': 16})
  model = tiny.options({**moe, **ROUTERS[name]}, **{**sizes, **model})
  return model.build(steps.RULES)


def assert_same(a, b):
  a, b = tiny.leaves(a), tiny.leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', [n for n in ROUTERS if n not in ('still', 'batch_priority')]
)
def test_three_steps_are_the_recorded_ones_bit_for_bit(name):
  # Layers in and out of loops get their own choices.
  loops = dict(layers='0,3', scan_layers=True)
  model = model_of(name, **(loops if name == 'token_major' else {}))
  state, metrics, records = steps.run(model)
  dropped = sum(step.sums.aux.stats.overflowed.sum() for step in metrics)
  assert (dropped > 0) == ROUTERS[name]['capacity'].binds
  new_state, new_metrics, _ = steps.run(model, records)
  assert_same(state, new_state)
  assert_same(metrics, new_metrics)


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
  assert len(records) == len(model.stacks.sequences)
  assert sum(len(r.layers) for r in records) == len(model.stacks.sparse_layers)
  replayed_logits, replayed_aux, _ = run(replay.imposed(model, batch, *records))
  assert_same((logits, aux), (replayed_logits, replayed_aux))
  # Choices of other layers give another result.
  swapped_records = [
    r._replace(layers=dict(zip(r.layers, [*r.layers.values()][::-1])))
    for r in records
  ]
  swapped_logits, *_ = run(replay.imposed(model, batch, *swapped_records))
  assert np.abs(np.asarray(logits - swapped_logits)).max() > 1e-3


def test_other_choices_than_a_routers_own_change_what_it_computes():
  model = model_of('batch_priority')
  batch, run = batch_of(), steps.forward(model)
  usual_logits, aux, choices = run(replay.imposed(model, batch))
  record = steps.record(model, batch, choices)
  mirrored_layers = {
    i: layer._replace(
      expert=np.where(layer.expert < 0, -1, E - 1 - layer.expert)
    )
    for i, layer in record.layers.items()
  }
  logits, _, made = run(replay.imposed(model, batch, record))
  assert_same((usual_logits, choices), (logits, made))
  mirrored = record._replace(layers=mirrored_layers)
  mirrored_logits, mirrored_aux, _ = run(replay.imposed(model, batch, mirrored))
  assert np.abs(np.asarray(usual_logits - mirrored_logits)).max() > 1e-2
  load = np.asarray(aux.stats.load)
  np.testing.assert_array_equal(load[..., ::-1], mirrored_aux.stats.load)
  assert (load[..., ::-1] != load).any()


def test_a_record_of_another_batch_or_model_is_refused():
  model, batch = model_of('batch_priority'), batch_of()
  _, _, choices = steps.forward(model)(replay.imposed(model, batch))
  record = steps.record(model, batch, choices)
  with pytest.raises(ValueError, match='of 48 are others'):
    replay.imposed(model, batch_of(1), record)
  one_layer = record._replace(layers={1: record.layers[1]})
  with pytest.raises(ValueError, match=r"layers \{'': \[1\]\}.* are \{'': \["):
    replay.imposed(model, batch, one_layer)
  with pytest.raises(ValueError, match='layer 1: the record has'):
    small_model = model_of('batch_priority', num_experts=2)
    replay.imposed(small_model, batch, record)
  with pytest.raises(ValueError, match="replay='x': Hierarchical makes its"):
    tiny.moe_options(router=Hierarchical(), replay='x')
