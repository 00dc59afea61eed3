"""Meshes, and the table from logical axes to mesh axes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from moe_jax import models, partitioning
from moe_jax.layers.parameters import axes_of, roles_of
from moe_jax.layers.routers import TokenChoice
from moe_jax.partitioning import (
  MeshOptions,
  ShardingOptions,
  make_mesh,
  sharding,
)
from moe_jax.training.optimizer import Adafactor
from moe_jax.training.programs import like_params
from tests.models import tiny

RULES = ShardingOptions().rules
T, V = 6, 26


def sizes(data=1, fsdp=1, expert=1, tensor=1):
  return dict(data=data, fsdp=fsdp, expert=expert, tensor=tensor)


@pytest.mark.parametrize(
  ('asked', 'shape'),
  [
    (dict(fsdp=2, expert=-1, tensor=2), (1, 2, 2, 2)),
    (dict(data=2, fsdp=-1, expert=4), (2, 1, 4, 1)),
  ],
)
def test_one_axis_takes_what_is_left_of_the_devices(asked, shape):
  mesh = make_mesh(asked)
  assert mesh.axis_names == partitioning.MESH_AXES
  assert mesh.devices.shape == shape
  assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
  ('num_experts', 'num_devices', 'data', 'expert'),
  [(8, 4, 1, 4), (6, 8, 4, 2), (0, 8, 8, 1)],
)
def test_experts_are_split_over_devices_that_divide_them(
  num_experts, num_devices, data, expert
):
  options = MeshOptions.for_experts(num_experts, num_devices)
  assert (options.data, options.expert) == (data, expert)
  mesh = options.make(jax.devices()[:num_devices])
  assert mesh.size == num_devices


def test_slices_are_next_to_each_other_on_their_axis():
  # With two slices of four devices, data has one device a slice and expert has
  # four.
  mesh = make_mesh(dict(expert=4, dcn_data=2))
  assert mesh.devices.shape == (2, 1, 4, 1)
  ids = [[d.id for d in row] for row in mesh.devices.reshape(2, 4)]
  assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
  # With data of two devices in each of two slices, those of a slice are
  # neighbours.
  mesh = MeshOptions(data=-1, tensor=2, dcn_data=2).make()
  assert mesh.devices.shape == (4, 1, 1, 2)
  ids = [sorted(d.id for d in row) for row in mesh.devices.reshape(2, 4)]
  assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]


@dataclasses.dataclass(frozen=True)
class Chip:
  """The attributes of a device in a pod that a mesh uses."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'gpu'
  device_kind: str = 'chip'


def test_a_pods_own_slices_are_kept_apart():
  # Devices of neighbouring numbers are in different slices.
  chips = [Chip(i, slice_index=i % 2) for i in range(8)]
  sizes = dict(data=2, expert=2, dcn_expert=2)
  grid = make_mesh(sizes, chips).devices
  assert grid.shape == (2, 1, 4, 1)
  slices = [[chip.slice_index for chip in row] for row in grid[:, 0, :, 0]]
  assert slices == [[0, 0, 1, 1], [0, 0, 1, 1]]
  with pytest.raises(ValueError, match=r'multiply to 4, and .* in 2 slices'):
    make_mesh(dict(data=2, dcn_data=4), chips)
  chips = [dataclasses.replace(chip, platform='tpu') for chip in chips]
  message = r"8 TPUs are in 2 slices, and mesh={'data': -1} .* set dcn_data=2"
  with pytest.raises(ValueError, match=message):
    make_mesh(dict(data=-1), chips)


def test_rules_are_lists_of_mesh_axes():
  rules = ShardingOptions(batch='data, fsdp', kv='', mlp='tensor').rules
  assert dict(rules)['batch'] == ('data', 'fsdp')
  assert dict(rules)['kv'] == () and dict(rules)['mlp'] == ('tensor',)


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
  ('axes', 'shape', 'spec'),
  [
    (('vocab', 'embed'), (257, 8), (None, ('tensor', 'fsdp'))),
    (('embed', 'vocab'), (8, 257), (('tensor', 'fsdp'), None)),
    (('vocab', 'embed'), (257, 6), (None, ('fsdp',))),
    (('vocab', 'embed'), (258, 6), (('tensor',), ('fsdp',))),
  ],
)
def test_the_axes_of_a_vocabulary_that_does_not_divide_split_its_rows(
  axes, shape, spec
):
  mesh = make_mesh(sizes(data=2, fsdp=2, tensor=2))
  assert sharding(mesh, RULES, axes, shape).spec == PartitionSpec(*spec)


def build():
  router = TokenChoice(jitter=0.01)
  moe = dict(layers='every 2', num_experts=8, num_selected=2, router=router)
  ffn, attention = {'hidden': 24}, {'head_width': 0}
  return tiny.build(moe, vocab_size=V, width=16, ffn=ffn, attention=attention)


def param_shardings(mesh, boxed):
  return partitioning.tree_shardings(
    mesh, RULES, axes_of(boxed), nn.meta.unbox(boxed)
  )


def test_factored_statistics_are_split_as_the_dimensions_they_keep():
  # The row statistic of an expert of 4 x 6 keeps 4 and its column statistic 6.
  # For experts of 4 x 4 both are split as the rows are.
  mesh = make_mesh(sizes(fsdp=2, expert=2, tensor=2))
  axes = ('layers', 'expert', 'embed', 'expert_mlp')
  boxed = {
    'w': nn.LogicallyPartitioned(jnp.ones((3, 2, 4, 6)), axes),
    'square': nn.LogicallyPartitioned(jnp.ones((3, 2, 4, 4)), axes),
    'scale': nn.LogicallyPartitioned(jnp.ones((3, 4)), ('layers', 'embed')),
  }
  boxed = jax.eval_shape(lambda: boxed)
  params, layout = nn.meta.unbox(boxed), param_shardings(mesh, boxed)
  optimizer = Adafactor(min_factored_size=2).transformation(
    1000, axes_of(boxed), roles_of(boxed)
  )
  state = jax.eval_shape(optimizer.init, params)
  shardings = like_params(mesh, state, params, layout)
  shapes = tiny.leaves(state)
  fsdp, expert, tensor = 'fsdp', 'expert', 'tensor'
  want = {
    'w': {(3, 2, 4): (None, expert, fsdp), (3, 2, 6): (None, expert, tensor)},
    'square': {(3, 2, 4): (None, expert, fsdp)},
    'scale': {(3, 4): (None, fsdp)},
  }
  checked = set()
  for name, leaf_sharding in tiny.leaves(shardings).items():
    (owner,) = [key for key in want if f'/{key}/' in f'/{name}/'] or [None]
    spec = want.get(owner, {}).get(shapes[name].shape)
    if spec is not None:
      checked.add((owner, shapes[name].shape))
      assert tuple(leaf_sharding.spec) == spec, name
  assert checked == {(key, shape) for key in want for shape in want[key]}


def test_every_parameter_has_its_place():
  mesh = make_mesh(sizes(fsdp=2, expert=2, tensor=2))
  shardings = tiny.leaves(
    param_shardings(mesh, models.abstract_params(build()))
  )
  specs = {
    name: tuple(leaf_sharding.spec) for name, leaf_sharding in shardings.items()
  }
  fsdp, expert, tensor = 'fsdp', 'expert', 'tensor'
  layer = 'layers/layer_1/'
  assert specs['embedding'] == (tensor, fsdp)
  assert specs[layer + 'attention/w_query'] == (None, fsdp, tensor, None)
  assert specs[layer + 'attention/w_key'] == (None, fsdp, None, None)
  assert specs[layer + 'moe/router/w'] == (None, fsdp, None)
  assert specs[layer + 'moe/experts/w_in'] == (None, expert, fsdp, tensor)
  assert specs[layer + 'moe/experts/w_out'] == (None, expert, tensor, fsdp)
  assert specs['layers/layer_0/ffn/w_in'] == (None, fsdp, tensor)
