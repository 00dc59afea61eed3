"""Variables of runs that are not trained, in one file."""

import jax
import numpy as np

from moe_jax.device_mesh import make_mesh
from moe_jax.partitioning import sharding
from moe_jax.runs import packed_weights


def test_arrays_of_any_shape_and_order_are_read_as_written(tmp_path):
  params = {
    'kernel': np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
    'scale': np.float32(1.5),  # of shape ()
  }
  packed_weights.write(tmp_path, {'params': params})
  on_device = sharding(make_mesh({'data': 1}, jax.devices()[:1]), (), ())
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x), 'float32', sharding=on_device),
    params,
  )
  read = packed_weights.read(tmp_path, {'params': abstract}).state['params']
  for name, array in params.items():
    assert read[name].shape == np.shape(array)
    np.testing.assert_array_equal(read[name], array)
