"""The files of a checkpoint's arrays, which Orbax writes and reads."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class _OneTransactionHandler(ocp.type_handlers.ArrayHandler):
  """Writes the arrays of a state as one transaction, without further files.

  Orbax's default writes small files for each array, and files of shardings and
  write shapes, which `Checkpointer` does not read. They take a third of a
  save's time.
  """

  def __init__(self):
    super().__init__(enable_write_sharding_file=False)

  async def serialize(self, values, infos, args=None):
    for info in infos:
      info.byte_limiter = None  # with a limit, Orbax makes no transaction
    return await super().serialize(values, infos, args)


def checkpointer() -> ocp.AsyncCheckpointer:
  """Orbax's checkpointer, for states of `jax.Array` or numpy copies of them."""
  handlers = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, _OneTransactionHandler()),
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
  )
  return ocp.AsyncCheckpointer(
    # Compression takes a quarter of a save's time from training, and saves only
    # a twentieth of the bytes, as weights are mostly noise.
    ocp.PyTreeCheckpointHandler(
      use_compression=False, type_handler_registry=handlers
    ),
    # If Orbax's thread cannot make a folder, its other threads wait for the
    # folder, and the interpreter's exit for those, for five minutes.
    async_options=ocp.options.AsyncOptions(
      create_directories_asynchronously=False
    ),
  )


def restore_args(abstract_state: Any, partial: bool) -> ocp.args.PyTreeRestore:
  """Arguments that restore a state with the given dtypes and shardings.

  Args:
    abstract_state: A tree of shapes with dtypes; see `Checkpointer.restore`.
    partial: Whether the checkpoint may hold more than these.
  """
  target = jax.tree.map(_with_sharding, abstract_state)
  array_args = ocp.checkpoint_utils.construct_restore_args(target)
  return ocp.args.PyTreeRestore(target, array_args, partial_restore=partial)


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
  """`leaf` with a sharding; without it Orbax uses the saving run's devices."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
