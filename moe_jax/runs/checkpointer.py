"""Saves and restores checkpoints of a train state.

Checkpoints are written asynchronously, verified, and restored bit for bit.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from moe_jax.devices import from_first, is_first
from moe_jax.errors import InputError
from moe_jax.runs import finite
from moe_jax.runs import manifest as manifest_lib
from moe_jax.runs.retention import CheckpointError, Directory
from moe_jax.runs.storage_errors import Retry, describe

_LOG = logging.getLogger(__name__)
# The loggers to which Orbax's messages go.
_LOGGERS = logging.getLogger('absl'), logging.getLogger('asyncio')


class Restored(NamedTuple):
  """A checkpoint that has been read.

  Attributes:
    state: The saved state, in the dtypes and shardings that were asked for.
    extra: The JSON values that were saved with the state.
    step: The optimizer step after which the state was saved.
    skipped: Newer checkpoints that are not good, as (step, reason), newest
      first; only process 0 has them.
  """

  state: Any
  extra: dict[str, Any]
  step: int
  skipped: list[tuple[int, str]]


class Checkpointer(Directory):
  """The checkpoints of one run in one directory; a context manager.

  If it is not closed, a pending save is lost when the interpreter exits.
  """

  def __post_init__(self):
    super().__post_init__()
    # Several processes would have to agree to try again to write arrays.
    self._array_retry = self.retry if jax.process_count() == 1 else Retry()
    self._orbax = _orbax_checkpointer()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending: tuple[int, concurrent.futures.Future] | None = None
    self._last_step: int | None = None  # the step last saved or restored
    self._save_count = 0
    self._filter = functools.partial(_not_from_orbax)  # of this object alone

  @property
  def last_step(self) -> int | None:
    """The step that is being saved, or was last saved or restored, if any."""
    return self._pending[0] if self._pending else self._last_step

  def save(
    self,
    step: int,
    state: Any,
    *,
    extra: dict[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
  ) -> bool:
    """Starts saving `state`; its arrays are copied out before this returns.

    This waits for the previous save. If `step` is `last_step`, the arrays are
    not saved again, and nothing is waited for: `extra` and `metrics` are added
    to the values of that step's checkpoint, or replace values of the same name.
    Checkpoints in the directory at or after `step`, or after the restored step,
    are set aside. Every process has to call this.

    Args:
      step: The optimizer step.
      state: Any pytree of jax arrays.
      extra: Values that JSON can hold (tuples come back as lists); those of
        process 0 are saved.
      metrics: Scalars by name; a scalar that is not finite is never the best.

    Returns:
      Whether arrays are saved.

    Raises:
      ValueError: A leaf is no jax array.
      TypeError: `extra` is not JSON.
      CheckpointError: A value of `state` is not finite, this save could not
        start, or the previous save failed.
    """
    manifest = manifest_lib.make(step, state, extra or {}, metrics or {})
    if step == self.last_step:
      before = self._pending[1] if self._pending else None
      self._pending = step, self._thread.submit(self._amend, manifest, before)
      return False
    self.wait()
    if bad := finite.not_finite(state):
      raise self._failure(step, f'not finite: {finite.listed(bad)}')
    try:
      if is_first():
        self.retry(self.make_room, step, self._last_step)
      multihost_utils.sync_global_devices(f'checkpoint {step}')
      # Further tries write this copy of the arrays. On a CPU it consists of
      # views, which keep the memory of `state` from being reused.
      tries = self._array_retry.tries
      copy = jax.device_get(state) if tries > 1 else None
      folder = self._array_retry(self._write, step, state)
    except Exception as error:
      self._clear_away()
      raise self._failure(step, describe(error)) from None
    future = self._thread.submit(self._finish, folder, manifest, copy)
    self._pending = step, future
    return True

  def wait(self) -> None:
    """Waits until the pending save, its manifest and the pruning are done.

    Raises:
      CheckpointError: The save failed; the files it had written are removed.
    """
    if self._pending is None:
      return
    step, future = self._pending
    try:
      future.result()
    except Exception as error:
      self._pending = None
      raise self._failure(step, describe(error)) from None
    self._pending, self._last_step = None, step

  def __enter__(self) -> Self:
    # Orbax reports a failed write in 200 lines, `CheckpointError` in two.
    for logger in _LOGGERS:
      logger.addFilter(self._filter)
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def close(self) -> None:
    """Waits for the pending save as `wait` does, and ends the threads."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._orbax.close()
      for logger in _LOGGERS:
        logger.removeFilter(self._filter)

  def restore(
    self,
    abstract_state: Any,
    *,
    step: int | None = None,
    partial: bool = False,
    cast: bool = False,
    first: Mapping[str, Any] | None = None,
  ) -> Restored | None:
    """Reads the newest good checkpoint; None if none was ever finished.

    A checkpoint with a value that is not finite is not good. As the run goes on
    from the checkpoint that is read, a later save of this checkpointer sets
    newer checkpoints aside; to only read, use another checkpointer.

    Args:
      abstract_state: A pytree of `jax.ShapeDtypeStruct` (or arrays). Leaves
        come back in their `sharding`, on any mesh; without one, on the first
        local device.
      step: The step to read instead of the newest good one.
      partial: Whether the checkpoint may hold more than `abstract_state`, such
        as the optimizer's state, which is then not read.
      cast: Whether `abstract_state` may have other floating-point types than
        were saved; leaves are converted as they are read.
      first: The collections (entries such as 'params') to use instead of
        `abstract_state` for a checkpoint of step 0, which holds the parameters
        of an imported model, say, and perhaps the state of its routers. A
        collection of which the checkpoint holds nothing is left out, unless it
        is the first of `first`.

    Raises:
      ValueError: `step` does not exist, or the trees differ in their paths,
        shapes or dtypes, which are listed.
      CheckpointError: `step` is not good; or some checkpoints are finished and
        none is good; or a pending save failed.
    """
    self.wait()
    folders, skipped = self.folders(), list[tuple[int, str]]()
    if step is not None and step not in folders:
      raise InputError(
        f'no checkpoint {step} in {self.path}; have {self.steps()}'
      )
    candidates = folders[::-1] if step is None else [step]

    def good_steps():
      for candidate in candidates:
        if problem := self.problem(candidate):
          skipped.append((candidate, problem))
        else:
          yield candidate

    # Process 0 verifies for all processes.
    good = good_steps() if is_first() else iter(())
    while (found_step := int(from_first(next(good, -1)))) >= 0:
      manifest, target = self.manifest(found_step), abstract_state
      if found_step == 0 and first is not None:
        stored = {path.split('/')[0] for path in manifest.tree}
        always = next(iter(first), None)
        target = {k: v for k, v in first.items() if k == always or k in stored}
      saved, wanted = manifest.tree, manifest_lib.describe(target)
      if partial:
        saved = {path: saved[path] for path in saved if path in wanted}
      if text := manifest_lib.difference(saved, wanted, cast=cast):
        folder = self.folder(found_step)
        raise InputError(f'{folder} holds another state\n{text}')
      state = self._load(found_step, target, partial)
      if not (bad := finite.not_finite(state)):
        self._last_step = found_step
        return Restored(state, manifest.extra, found_step, skipped)
      skipped.append((found_step, f'not finite: {finite.listed(bad)}'))
    if not folders:
      return None
    reasons = '; '.join(f'{number}: {reason}' for number, reason in skipped)
    message = f'no good checkpoint in {self.path} ({reasons})'
    if step is not None or self.steps():
      raise CheckpointError(f'{message}\nfinished steps: {self.steps()}')
    _LOG.warning(message)
    return None

  def _amend(
    self, added: manifest_lib.Manifest, before: concurrent.futures.Future | None
  ) -> None:
    """Adds values to a saved step's manifest, then deletes old checkpoints.

    `added` has the step, and as `extra` and `metrics` the values, which replace
    those of the same name. This runs on the checkpointer's thread, after its
    pending save, which is `before`; None means that no save is pending.
    """
    if before is not None:
      before.result()
    if not is_first():
      return
    old = self.manifest(added.step)
    new = dataclasses.replace(
      old, extra=old.extra | added.extra, metrics=old.metrics | added.metrics
    )
    if new != old:
      self.retry(manifest_lib.write, self.folder(added.step), new)
    self.prune()

  def _write(self, step: int, state: Any) -> epath.Path:
    """Starts Orbax's write of a state, and returns the folder it writes to."""
    self._save_count += 1  # a new folder, as a failed save may still be writing
    folder = self.folder(step, f'.saving{self._save_count}')
    self._orbax.save(folder, ocp.args.PyTreeSave(state))
    return folder

  def _finish(
    self, folder: epath.Path | None, manifest: manifest_lib.Manifest, copy: Any
  ) -> None:
    """Waits until Orbax has written a folder, and makes it a checkpoint.

    The manifest is added, the folder gets its final name, and old checkpoints
    are deleted. This runs on the checkpointer's thread. `copy` is the state on
    the host, which a further try writes anew; None if there is only one try.
    """
    # With a copy on the host another try repeats the whole save; so writing the
    # manifest and renaming are not tried again by themselves.
    retry = self.retry if copy is None else Retry()

    def finish():
      nonlocal folder
      try:
        folder = folder or self._write(manifest.step, copy)
        self._orbax.wait_until_finished()
        if is_first():
          retry(manifest_lib.write, folder, manifest)
          retry(folder.rename, self.folder(manifest.step))
      except Exception:
        folder = None
        self._clear_away()
        raise

    self._array_retry(finish)
    if is_first():
      self.prune()

  def _clear_away(self) -> None:
    """Removes a failed save's files, as the disk is probably full."""
    with contextlib.suppress(Exception):
      self._orbax.wait_until_finished()  # else the next save raises its errors
    with contextlib.suppress(OSError):
      if is_first():
        self.remove_leftovers()

  def _load(self, step: int, abstract_state: Any, partial: bool) -> Any:
    """Reads a checkpoint's arrays in the dtypes and shardings of a tree.

    Arrays without a sharding come to the first local device. With `partial` the
    checkpoint may hold more arrays than the tree, which are not read.
    """
    # Without a sharding Orbax would use the devices of the run that saved.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf):
      sharding = getattr(leaf, 'sharding', None) or device
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    target = jax.tree.map(placed, abstract_state)
    array_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, array_args, partial_restore=partial)
    try:
      return self.retry(self._orbax.restore, self.folder(step), args)
    except Exception as error:
      raise CheckpointError(
        f'checkpoint {step} in {self.path} is as it was saved but cannot be '
        f'read: {describe(error)}'
      ) from error

  def _failure(self, step: int, reason: str) -> CheckpointError:
    return CheckpointError(
      f'checkpoint {step} not saved to {self.path}: {reason}\n'
      f'last good step: {self.newest_good()}'
    )


def _not_from_orbax(record: logging.LogRecord) -> bool:
  """Whether a log record is not about Orbax: neither from it nor naming it.

  Loggers that have this as a filter drop all records about Orbax.
  """
  return 'orbax' not in record.pathname + record.getMessage()


class _OneTransactionHandler(ocp.type_handlers.ArrayHandler):
  """Writes the arrays of a state as one transaction, without further files.

  Orbax's default writes small files for each array, and files of shardings and
  write shapes, which `Checkpointer` does not read. They take a third of a
  save's time.
  """

  async def serialize(self, values, infos, args=None):
    for info in infos:
      info.byte_limiter = None  # with a limit, Orbax makes no transaction
    return await super().serialize(values, infos, args)


def _orbax_checkpointer() -> ocp.AsyncCheckpointer:
  """Makes Orbax's checkpointer for states of `jax.Array` or numpy arrays."""
  handlers = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, _OneTransactionHandler(enable_write_sharding_file=False)),
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
  )
  return ocp.AsyncCheckpointer(
    # Compression would slow down training, by a quarter of the time of a save,
    # and save only a twentieth of the bytes, as weights are mostly noise.
    ocp.PyTreeCheckpointHandler(
      use_compression=False, type_handler_registry=handlers
    ),
    # If Orbax's thread cannot make a folder, its other threads wait for the
    # folder, and the interpreter's exit for these threads, for five minutes. So
    # the folder is made before `save` returns, which then raises the error.
    async_options=ocp.options.AsyncOptions(
      create_directories_asynchronously=False
    ),
  )
