"""The parts of an array that each device holds."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.analysis import sharded
from moe_jax.partitioning import MeshOptions


def test_two_copies_of_four_experts_on_eight_devices():
  mesh = MeshOptions(data=2, expert=4).make()
  kernel_sharding = NamedSharding(mesh, PartitionSpec(None, 'expert'))
  kernels = jax.ShapeDtypeStruct((3, 4, 5), 'float32', sharding=kernel_sharding)
  devices, holds = sharded.holders(kernels, 1)
  assert [device.id for device in devices] == list(range(8))
  np.testing.assert_array_equal(holds, np.tile(np.eye(4, dtype=bool), (2, 1)))
  # No device lacks anything of the dimensions that are not split.
  assert sharded.holders(kernels, 0)[1].all()


def test_one_device_holds_all():
  devices, holds = sharded.holders(jax.numpy.zeros((2, 6)), 1)
  assert devices == jax.devices()[:1]
  np.testing.assert_array_equal(holds, np.ones((1, 6), bool))
