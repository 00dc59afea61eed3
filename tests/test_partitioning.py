"""Meshes, the table of axes, and sharded runs equal to one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from configs import base
from moe_jax import models, partitioning
from moe_jax.layers.initializers import axis_names
from moe_jax.partitioning import make_mesh, make_rules, sharding
from moe_jax.training.losses import LossWeights, normalizers
from moe_jax.training.step import make_grad_fn
from tests.models import tiny

RULES = make_rules(base.get_config().sharding)
B, T, V = 8, 6, 26


def sizes(data=1, fsdp=1, expert=1, tensor=1):
  return dict(data=data, fsdp=fsdp, expert=expert, tensor=tensor)


@pytest.mark.parametrize(
  ('asked', 'shape'),
  [
    (dict(data=-1), (8, 1, 1, 1)),
    (dict(fsdp=2, expert=-1, tensor=2), (1, 2, 2, 2)),
    (dict(data=2, fsdp=-1, expert=4), (2, 1, 4, 1)),
    (dict(tensor=8), (1, 1, 1, 8)),
  ],
)
def test_one_axis_takes_what_is_left_of_the_devices(asked, shape):
  mesh = make_mesh(asked)
  assert mesh.axis_names == partitioning.MESH_AXES
  assert mesh.devices.shape == shape
  assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_given_devices():
  mesh = make_mesh(dict(data=-1, tensor=2), jax.devices()[2:6])
  assert mesh.devices.shape == (2, 1, 1, 2)
  assert set(mesh.devices.flat) == set(jax.devices()[2:6])


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    (dict(data=3, fsdp=-1), 'does not fit 8 devices'),
    (dict(data=2, fsdp=2), 'multiply to 4, which does not fit 8 devices'),
    (dict(data=16), 'does not fit 8 devices'),
    (dict(data=16, fsdp=-1), 'does not fit 8 devices'),
    (dict(data=-1, fsdp=-1), 'at most one -1'),
    (dict(data=0), 'sizes are positive'),
    (dict(data=-2), 'sizes are positive'),
    (dict(model=8), "unknown mesh axis 'model'"),
    (dict(expret=2), "did you mean 'expert'"),
  ],
)
def test_meshes_that_do_not_fit_are_refused(asked, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(asked)


def test_rules_are_lists_of_mesh_axes():
  table = {'batch': 'data, fsdp', 'kv': '', 'mlp': 'tensor'}
  assert make_rules(table) == {
    'batch': ('data', 'fsdp'),
    'kv': (),
    'mlp': ('tensor',),
  }
  with pytest.raises(ValueError, match=r"sharding\.mlp 'tensr'; did you mean"):
    make_rules({'mlp': 'tensr'})


def test_a_sharding_follows_the_table_and_skips_axes_of_one():
  mesh = make_mesh(sizes(fsdp=2, expert=2, tensor=2))

  def spec(*axes):
    return sharding(mesh, RULES, axes).spec

  assert spec('expert', 'embed', 'expert_mlp') == PartitionSpec(
    ('expert',), ('fsdp',), ('tensor',)
  )
  assert spec('batch', None) == PartitionSpec(('fsdp', 'expert'), None)
  assert spec('layers', 'kv') == PartitionSpec(None, None)
  assert spec() == PartitionSpec()


@pytest.mark.parametrize(
  ('axes', 'shape', 'message'),
  [
    (('embed', 'heds'), None, "unknown logical axis of w 'heds'; did you mean"),
    (('mlp', 'heads'), None, "w: sharding maps 'mlp' and 'heads' to mesh axis"),
    (('embed', 'kv'), (5, 2), 'w: embed=5 does not divide by 2 devices'),
    (('batch',), (6,), 'w: batch=6 does not divide by 4 devices'),
  ],
)
def test_shardings_that_do_not_fit_are_refused(axes, shape, message):
  mesh = make_mesh(sizes(fsdp=2, expert=2, tensor=2))
  with pytest.raises(ValueError, match=message):
    sharding(mesh, RULES, axes, shape, 'w')


def build(**moe):
  return models.build(
    tiny.config(
      dict(layers='every 2', num_experts=8, num_selected=2, jitter=0.01, **moe),
      vocab_size=V,
      width=16,
      hidden=24,
    )
  )


def param_shardings(mesh, boxed):
  return partitioning.tree_shardings(
    mesh, RULES, axis_names(boxed), nn.meta.unbox(boxed)
  )


def test_optimizer_moments_live_where_their_parameters_do():
  mesh = make_mesh(sizes(fsdp=2, expert=2, tensor=2))
  boxed = models.abstract_params(build(), T)
  params, places = nn.meta.unbox(boxed), param_shardings(mesh, boxed)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.constant_schedule(0.1)),
  )
  state = jax.eval_shape(optimizer.init, params)
  found = partitioning.like_params(mesh, state, params, places)
  adam = found[1][0]
  assert adam.mu == adam.nu == places
  whole = NamedSharding(mesh, PartitionSpec())
  assert adam.count == whole
  used = {place.spec for place in jax.tree.leaves(places)}
  assert len(used) > 5


def test_statistics_of_another_shape_are_whole():
  mesh = make_mesh(sizes(fsdp=2, tensor=4))
  boxed = {'w': nn.LogicallyPartitioned(jnp.ones((4, 8)), ('embed', 'mlp'))}
  boxed = jax.eval_shape(lambda: boxed)
  params, places = nn.meta.unbox(boxed), param_shardings(mesh, boxed)
  factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
  state = jax.eval_shape(factored.init, params)
  found = partitioning.like_params(mesh, state, params, places)
  whole = NamedSharding(mesh, PartitionSpec())
  assert all(place == whole for place in jax.tree.leaves(found))


def test_every_parameter_has_its_place():
  mesh = make_mesh(sizes(fsdp=2, expert=2, tensor=2))
  found = tiny.leaves(param_shardings(mesh, models.abstract_params(build(), T)))
  specs = {name: tuple(place.spec) for name, place in found.items()}
  fsdp, expert, tensor = 'fsdp', 'expert', 'tensor'
  layer = 'layers/layer_1/'
  assert specs['embedding'] == (tensor, fsdp)
  assert specs[layer + 'attention/w_query'] == (None, fsdp, tensor, None)
  assert specs[layer + 'attention/w_key'] == (None, fsdp, None, None)
  assert specs[layer + 'moe/router/w'] == (None, fsdp, None)
  assert specs[layer + 'moe/experts/w_in'] == (None, expert, fsdp, tensor)
  assert specs[layer + 'moe/experts/w_out'] == (None, expert, tensor, fsdp)
  assert specs['layers/layer_0/ffn/w_in'] == (None, fsdp, tensor)


def make_batch():
  rng = np.random.default_rng(0)
  segment_ids = np.ones((B, T), np.int32)
  segment_ids[0, 4:] = 0
  return {
    'tokens': rng.integers(0, V, (B, T), np.int32),
    'targets': rng.integers(0, V, (B, T), np.int32),
    'segment_ids': segment_ids,
    'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    'loss_weights': (segment_ids > 0).astype(np.float32),
  }


DROPLESS = (('dispatch', 'dropless'), ('capacity_rule', 'all'))


@functools.cache
def gradient(*mesh_shape, moe=()):
  """((loss, sums), gradient) of a training step, and its program.

  On a mesh or, without its shape, on one device.
  """
  model, batch = build(**dict(moe)), make_batch()
  grad_fn = make_grad_fn(model, LossWeights(balance=0.1, z=0.1))
  places, batch_place = None, None
  params = tiny.params_of(model)
  if mesh_shape:
    mesh = make_mesh(dict(zip(partitioning.MESH_AXES, mesh_shape)))
    places = param_shardings(mesh, models.abstract_params(model, T))
    batch_place = sharding(mesh, RULES, ('batch', None), (B, T))
    params = jax.device_put(params, places)
    batch = jax.device_put(batch, batch_place)
    shard = params['layers']['layer_1']['moe']['experts']['w_in']
    assert len(shard.sharding.device_set) == 8

  def run(params, batch, key):
    result, grads = grad_fn(params, batch, normalizers(batch), key)
    if places is not None:
      grads = jax.lax.with_sharding_constraint(grads, places)
    return result, grads

  args = params, batch, jax.random.key(0)
  compiled = jax.jit(run).lower(*args).compile()
  return compiled(*args), compiled.as_text()


@pytest.mark.parametrize(
  'mesh_shape',
  [
    (1, 2, 2, 2),
    *(
      pytest.param(shape, marks=pytest.mark.slow)
      for shape in ((8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2), (1, 8, 1, 1))
    ),
  ],
)
def test_a_sharded_step_equals_one_device(mesh_shape):
  ((loss, sums), grads), _ = gradient(*mesh_shape)
  ((one_loss, one_sums), one_grads), _ = gradient()
  assert one_sums.aux.stats.overflowed.sum() > 0
  np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
  tiny.assert_trees_close(sums, one_sums, rtol=1e-4, atol=1e-4)
  tiny.assert_trees_close(grads, one_grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  ('mesh_shape', 'devices_of_rows', 'devices_of_hidden'),
  [
    ((1, 2, 2, 2), 4, 2),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ((8, 1, 1, 1), 8, 1),
        ((2, 1, 2, 2), 4, 2),
        ((2, 2, 2, 1), 8, 1),
      )
    ),
  ],
)
def test_a_dropless_step_equals_one_device_and_each_serves_its_own(
  mesh_shape, devices_of_rows, devices_of_hidden
):
  ((loss, sums), grads), text = gradient(*mesh_shape, moe=DROPLESS)
  ((one_loss, one_sums), one_grads), one_text = gradient(moe=DROPLESS)
  assert one_sums.aux.stats.overflowed.sum() == 0
  np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
  tiny.assert_trees_close(sums, one_sums, rtol=1e-4, atol=1e-4)
  tiny.assert_trees_close(grads, one_grads, rtol=1e-3, atol=1e-5)
  # Two choices a token; the first products' rows, as the backward pass reads.
  whole = f'f32[{2 * B * T},24]'
  share = f'f32[{2 * B * T // devices_of_rows},{24 // devices_of_hidden}]'
  assert whole in one_text
  assert share in text and whole not in text
