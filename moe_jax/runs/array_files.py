"""The files of a checkpoint's arrays, which Orbax writes and reads.

Not here: when they are written, and what seals them (`checkpointer.py`).
"""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class _AtOnce(ocp.type_handlers.ArrayHandler):
  """Writes a state's arrays as one transaction, and nothing beside them.

  Each array for itself makes many small files, and shardings and write shapes
  others, that `Checkpointer` does not read: together a third of the time.
  """

  def __init__(self):
    super().__init__(enable_write_sharding_file=False)

  async def serialize(self, values, infos, args=None):
    for info in infos:
      info.byte_limiter = None  # with a limit, there is no transaction
    return await super().serialize(values, infos, args)


def checkpointer() -> ocp.AsyncCheckpointer:
  """For states of `jax.Array`, and host copies of them."""
  handlers = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, _AtOnce()),
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
  )
  return ocp.AsyncCheckpointer(
    # Compressing takes a quarter of a save's time, which training then lacks,
    # and spares a twentieth of the bytes: weights are mostly noise.
    ocp.PyTreeCheckpointHandler(
      use_compression=False, type_handler_registry=handlers
    ),
    # A folder that its thread cannot make leaves others waiting for it, and the
    # interpreter's exit for them, for five minutes.
    async_options=ocp.options.AsyncOptions(
      create_directories_asynchronously=False
    ),
  )


def to_restore(abstract_state: Any, partial: bool) -> ocp.args.PyTreeRestore:
  """What `checkpointer` is asked for, in the types and places described."""
  target = jax.tree.map(_placed, abstract_state)
  how = ocp.checkpoint_utils.construct_restore_args(target)
  return ocp.args.PyTreeRestore(target, how, partial_restore=partial)


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
  """`leaf` with a sharding: else Orbax takes the devices of the saving run."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
