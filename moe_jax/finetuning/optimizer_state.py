"""Reads another run's optimizer state, with which a run can begin."""

import pathlib
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from moe_jax.errors import InputError
from moe_jax.runs import manifest as manifest_lib
from moe_jax.runs.checkpointer import Checkpointer, Restored
from moe_jax.runs.retention import Directory
from moe_jax.runs.workdir import checkpoints_of, kept_config
from moe_jax.training.setup import Run


def restore(run: Run, folder: pathlib.Path, step: int) -> tuple[Any, str]:
  """The optimizer's state for a run's first step, from another run.

  Moments are copied with their step counts (for Adam's bias correction and
  Adafactor's decay): with counts of 0 they would be scaled as after one step.
  The learning-rate schedule's count restarts at 0. The other run may have
  trained more parameters, and its optimizer may have kept more of each.

  Args:
    run: The run.
    folder: The folder of the other run, whose parameters are all copied.
    step: The step of the other run's checkpoint.

  Returns:
    The state, and a phrase that says at the start of the run what was copied.

  Raises:
    ValueError: The other run's state does not fit: the other run has another
      optimizer, or did not train a parameter that this run trains, or one of
      the runs has adapters.
    CheckpointError: The checkpoint is not good.
  """
  directory = checkpoints_of(folder)
  saved = Directory(directory).manifest(step).tree
  opt_state = run.programs.abstract_state.opt_state
  own_links = _links(manifest_lib.describe({'opt_state': opt_state}))
  link_pairs = dict(zip(own_links, _links(saved) or own_links))
  # The state of this run's chain, in the order of the other run's. The schedule
  # is read, too, although a new one takes its place.
  links: list[Any] = [optax.EmptyState()] * (1 + max(link_pairs.values()))
  for link, saved_link in link_pairs.items():
    links[saved_link] = opt_state[link]
  target = {'opt_state': tuple(links)}
  wanted = manifest_lib.describe(target)
  present = {path: saved[path] for path in wanted if path in saved}
  problem = manifest_lib.difference(present, wanted, cast=True)
  if run.options.lora.rank:
    problem = 'the factors of adapters are new, and so is their state'
  if problem:
    raise InputError(
      f'init_from.keep_optimizer=True: the state of the optimizer in the '
      f'checkpoint of step {step} of {folder} does not fit this run '
      f'{_settings(run, folder)}; set it to False for a new optimizer\n'
      f'{problem}'
    )
  with Checkpointer(directory) as checkpoints:
    restored = checkpoints.restore(target, step=step, partial=True, cast=True)
    saved_state = cast(Restored, restored).state['opt_state']
  schedule = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
    opt_state[-1],
  )
  state = [*opt_state[:-1], schedule]
  for link, saved_link in link_pairs.items():
    if link != len(opt_state) - 1:
      state[link] = saved_state[saved_link]
  count = len(jax.tree.leaves(opt_state[:-1]))
  description = (
    f'the optimizer keeps its {count} arrays of moments and their counts, and '
    'its schedule begins anew'
  )
  return tuple(state), description


def _links(described: Iterable[str]) -> list[int]:
  """The indices in an Optax chain of the transformations that have a state.

  They are those of the optimizer and of its schedule, in this order. Without
  clipping or weight decay a chain has fewer transformations, so that the same
  transformation has another index. `described` has the paths of arrays, such as
  'opt_state/1/mu/layers/layer_0/w'.
  """
  paths = (path.split('/') for path in described)
  return sorted({int(path[1]) for path in paths if path[0] == 'opt_state'})


def _settings(run: Run, folder: pathlib.Path) -> str:
  """A text on the settings of two runs that decide the optimizer's state.

  The text calls `run` "here" and the run in `folder` "there".
  """
  config = kept_config(folder)
  old = (config.get('optimizer', {}).get('kind'), config.get('trainable'))
  rank = config.get('lora', {}).get('rank', 0)
  new = (type(run.options.optimizer).__name__, run.options.trainable)
  return (
    f'(optimizer {old[0]!r} there, {new[0]} here; trainable {old[1]!r} '
    f'there, {new[1]!r} here; lora.rank {rank} there, '
    f'{run.options.lora.rank} here)'
  )
