"""The state of another run's optimizer, with which a run can begin.

Not here: parameters of another run (`start.py`).
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.runs import manifest as manifest_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.retention import Directory
from moe_jax.runs.workdir import checkpoints_of, kept_config
from moe_jax.training.setup import Run


def restore(run: Run, folder: pathlib.Path, step: int) -> tuple[Any, str]:
  """The optimizer's state for a run's first step, from another run.

  Moments are taken with their counts (the number of steps by which Adam's are
  corrected and Adafactor's decay), since moments of many steps that count as
  none would be scaled as if they were of one. The count of the schedule of the
  learning rate begins at 0. The other run may have trained more parameters.

  Args:
    run: The run.
    folder: The folder of the other run, whose parameters are all copied.
    step: The step of its checkpoint.

  Returns:
    The state and words about it.

  Raises:
    ValueError: The other run's state does not fit: its optimizer is another, it
      did not train some parameter that trains here, or it has adapters.
    CheckpointError: The checkpoint is not good.
  """
  directory = checkpoints_of(folder)
  saved = Directory(directory, 1, False, '').manifest(step).tree
  ours = run.programs.abstract_state.opt_state
  target, places = _target(ours, saved)
  wanted = manifest_lib.describe({'opt_state': target})
  have = {path: saved[path] for path in wanted if path in saved}
  differences = manifest_lib.difference(have, wanted, cast=True)
  if run.options.lora.rank:
    differences = 'the factors of adapters are new, and so is their state'
  if differences or not wanted:
    raise ValueError(
      f'init_from.keep_optimizer=True: the state of the optimizer in the '
      f'checkpoint of step {step} of {folder} does not fit this run '
      f'{_settings(run, folder)}; set it to False for a new optimizer\n'
      f'{differences or "it has none"}'
    )
  with Checkpointer(directory, keep_best=False) as checkpoints:
    found = checkpoints.restore(
      {'opt_state': target}, step=step, partial=True, cast=True
    )
  schedule = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
    ours[-1],
  )
  state = [*ours[:-1], schedule]
  for own, theirs in places.items():
    if own != len(ours) - 1:
      state[own] = found.state['opt_state'][theirs]
  count = len(jax.tree.leaves(ours[:-1]))
  said = (
    f'the optimizer keeps its {count} arrays of moments and their counts, and '
    'its schedule begins anew'
  )
  return tuple(state), said


def _target(ours: Any, saved: dict[str, str]) -> tuple[tuple, dict[int, int]]:
  """The part of the other run's state that is read, and where it belongs.

  An optimizer is a chain: without clipping or weight decay it has fewer links,
  so that links with a state have other numbers. The last is the schedule,
  which Orbax reads with the others.

  Returns:
    The links of the other run, with the shapes of those that have a state; and
    the number there of each such link of ours, by its number here.
  """
  theirs = sorted(
    {int(path.split('/')[1]) for path in saved if path.startswith('opt_state/')}
  )
  own = [i for i, link in enumerate(ours) if jax.tree.leaves(link)]
  places = dict(zip(own, theirs))
  target = [optax.EmptyState() for _ in range(max(theirs, default=0) + 1)]
  for here, there in places.items():
    target[there] = ours[here]
  return tuple(target), places


def _settings(run: Run, folder: pathlib.Path) -> str:
  """The settings of both runs on which the state depends."""
  config = kept_config(folder)
  there = (config.get('optimizer', {}).get('kind'), config.get('trainable'))
  rank = config.get('lora', {}).get('rank', 0)
  here = (type(run.options.optimizer).__name__, run.options.trainable)
  return (
    f'(optimizer {there[0]!r} there, {here[0]} here; trainable {there[1]!r} '
    f'there, {here[1]!r} here; lora.rank {rank} there, '
    f'{run.options.lora.rank} here)'
  )
