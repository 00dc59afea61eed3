"""Gradients of steps whose choices are imposed, by finite differences.

Elsewhere gates of imposed choices were gathered from probabilities that were
masked to the router's own choices, so that imposed ones had silent zeros.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.analysis import replay
from moe_jax.analysis.traces import LayerChoices, Record
from moe_jax.layers.routers import TokenChoice
from moe_jax.models.recorded import recording
from moe_jax.routing.capacity import All
from moe_jax.training.programs import make_programs
from tests.models import tiny as tiny_models
from tests.training import tiny

E, K = 5, 2


def record_of(model, batch, experts):
  """The record of a batch, by a function from a layer to experts [B, T, K]."""
  ids = [np.asarray(batch[k]) for k in ('tokens', 'positions', 'segment_ids')]
  layers = {}
  for layer in model.stacks.sparse_layers:
    expert = np.where(ids[2][..., None] > 0, experts(layer), -1)
    layers[layer] = LayerChoices(expert, 0.0 * expert, expert >= 0)
  return Record('train', 0, 0, *ids, layers)


def unchosen(model, variables, batch):
  """A record in which tokens take experts that their routers like least.

  No token of the first layer has an expert of its own choice.
  """
  inputs = dict(model.inputs(batch), logits=True, dtype='float32')
  _, choices = recording(model, variables, **inputs)

  def least(layer):
    return np.argsort(choices[layer].logits, -1, kind='stable')[..., :K]

  first = model.stacks.sparse_layers[0]
  own = np.asarray(choices[first].expert)
  assert not (own[..., None] == least(first)[..., None, :]).any()
  return record_of(model, batch, least)


def part_of(params, name):
  """The parameters of routers ('router') or of experts ('experts') alone."""
  return {k: x for k, x in tiny_models.leaves(params).items() if name in k}


@pytest.mark.parametrize(
  'gates', ['renormalized', 'raw', 'sigmoid_renormalized']
)
def test_gradients_are_finite_differences_where_choices_are_imposed(gates):
  moe = dict(num_experts=E, num_selected=K, capacity=All())
  model = tiny_models.build({**moe, 'router': TokenChoice(gates=gates)})
  params = tiny_models.params_of(model)
  variables = {'params': params}
  batch = tiny.rows(3, 10, vocab_size=tiny_models.V)
  record = unchosen(model, variables, batch)
  batch = replay.imposed(model, batch, record)

  @jax.jit
  @jax.value_and_grad
  def loss_and_slope(params):
    outputs, _ = model.apply({'params': params}, **model.inputs(batch))
    return (model.loss(outputs, batch).nats * batch['loss_weights']).sum()

  _, slope = loss_and_slope(params)
  leaves, tree = jax.tree.flatten(slope)
  names = [*tiny_models.leaves(params)]
  for part in ('router', 'experts'):
    rng = np.random.default_rng(2)
    direction = tree.unflatten(
      [
        jnp.asarray(rng.normal(size=x.shape) * (part in n), x.dtype)
        for n, x in zip(names, leaves, strict=True)
      ]
    )
    assert any(part in n for n in names)
    size = 1e-2
    ahead, behind = (
      loss_and_slope(optax.tree.add_scale(params, h, direction))[0]
      for h in (size, -size)
    )
    expected = float(ahead - behind) / (2 * size)
    assert abs(expected) > 0.1
    along = float(optax.tree.vdot(slope, direction))
    assert along == pytest.approx(expected, rel=1e-2), part


@pytest.mark.slow
def test_devices_microbatches_and_packing_change_no_imposed_gradient():
  """Adam's first moment after one step is a tenth of the gradient."""
  moments = []

  def drawn(layer):
    draw = np.random.default_rng(layer).random((8, 24, 4))
    return np.argsort(draw)[..., :K]

  for mesh, microbatches in (
    ({'data': 1}, 1),
    ({'data': 2, 'expert': 2}, 2),
    ({'fsdp': 2, 'tensor': 2}, 1),
  ):
    options = tiny.options(
      batch_size=8,
      microbatches=microbatches,
      mesh=mesh,
      optimizer={'clip_norm': 0.0},
      trace={'every_steps': 1},
      model={'moe': {'layers': 'all', 'num_selected': K}},
    ).filled(257)
    model, batch = options.build(), jax.device_get(tiny.batch(options))
    assert (batch['segment_ids'] == 2).any() & (batch['segment_ids'] == 0).any()
    record = record_of(model, batch, drawn)
    num_devices = int(np.prod([*mesh.values()]))
    programs = make_programs(
      options, model, options.mesh.make(jax.devices()[:num_devices])
    )
    step = programs.put(replay.imposed(model, batch, record))
    state, _ = programs.train_step(tiny.first_state(programs), step)
    moments.append(optax.tree.get(jax.device_get(state.opt_state), 'mu'))
  for other in moments[1:]:
    for part in ('router', 'experts'):
      assert all(x.any() for x in part_of(other, part).values())
    for x, y in zip(*map(jax.tree.leaves, (moments[0], other)), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
