"""Reads another run's optimizer state, with which a run can begin."""

import itertools
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
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
  trained more parameters.

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
  abstract = run.programs.abstract_state
  opt_state = abstract.opt_state
  try:
    if run.options.lora.rank:
      raise InputError('the factors of adapters are new, and so is their state')
    arrays = {'params': abstract.params, 'opt_state': opt_state}
    link_pairs = paired_links(manifest_lib.describe(arrays), saved)
    target = _target(opt_state, link_pairs, saved)
  except InputError as error:
    raise InputError(
      f'init_from.keep_optimizer=True: the state of the optimizer in the '
      f'checkpoint of step {step} of {folder} does not fit this run '
      f'{_settings(run, folder)}; set it to False for a new optimizer\n{error}'
    ) from None
  with Checkpointer(directory) as checkpoints:
    restored = checkpoints.restore(
      {'opt_state': target}, step=step, partial=True, cast=True
    )
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


def paired_links(
  arrays: Mapping[str, str], saved: Mapping[str, str]
) -> dict[int, int]:
  """Pairs the transformations in two Optax chains that keep equal state.

  Without clipping or weight decay a chain has fewer transformations, so that
  the same transformation has another index. Two transformations keep equal
  state if the names in their states are equal, such as 'count', 'mu' and 'nu'
  of Adam, whichever parameters train. If several keep equal state, they are
  paired in their order.

  Args:
    arrays: Type and shape, as text, of a run's arrays by path, which begins
      with 'params/' or 'opt_state/'.
    saved: The same of another run, from a checkpoint's manifest; arrays of
      other trees in it are ignored.

  Returns:
    The index of a transformation in the other run's chain, by the index in this
    run's chain.

  Raises:
    ValueError: A state that one chain keeps is missing in the other chain.
  """
  links, saved_links = _links(arrays), _links(saved)
  if Counter(links.values()) != Counter(saved_links.values()):
    raise InputError(
      f'the links of its optimizer keep {_listed(saved_links)} there and '
      f'{_listed(links)} here (* is a parameter)'
    )
  orders = (sorted(x, key=lambda n: (x[n], n)) for x in (links, saved_links))
  return dict(zip(*orders, strict=True))


def _links(described: Mapping[str, str]) -> dict[int, tuple[str, ...]]:
  """The names in the state of each Optax transformation that has a state.

  `described` has the arrays in 'params/' and 'opt_state/', by path. The result
  is by the transformation's index in the chain; its names are sorted.
  """
  parameters = {
    path.removeprefix('params/')
    for path in described
    if path.startswith('params/')
  }
  links: dict[int, set[str]] = {}
  for path in described:
    tree, *rest = path.split('/')
    if tree == 'opt_state':
      links.setdefault(int(rest[0]), set()).add(_name(rest[1:], parameters))
  return {number: tuple(sorted(names)) for number, names in links.items()}


def _name(path: Sequence[str], parameters: Set[str]) -> str:
  """The path of an array in a transformation's state, as text, such as 'mu/*'.

  '*' stands for the path of one of `parameters` within it.
  """
  for start, end in itertools.combinations(range(len(path) + 1), 2):
    if '/'.join(path[start:end]) in parameters:
      path = [*path[:start], '*', *path[end:]]
      break
  return '/'.join(path)


def _listed(links: Mapping[int, tuple[str, ...]]) -> str:
  texts = [f'[{", ".join(names)}]' for _, names in sorted(links.items())]
  return ' and '.join(texts) or 'nothing'


def _target(
  opt_state: Any, link_pairs: Mapping[int, int], saved: Mapping[str, str]
) -> tuple[Any, ...]:
  """The parts of a saved optimizer state to read, in the shapes of `opt_state`.

  The learning-rate schedule, the last transformation, is read, too, although
  `restore` puts a new one in its place.

  Args:
    opt_state: The state of this run's chain, or its shapes.
    link_pairs: What `paired_links` returns: the index of each transformation in
      the saved chain, by its index in this run's.
    saved: The arrays of the checkpoint, by path, from its manifest.

  Returns:
    A chain's state in the order of the saved chain, with empty states for
    transformations that are not read.

  Raises:
    ValueError: The saved state lacks a part, or the part has another shape.
  """
  target = [
    optax.EmptyState() for _ in range(max(link_pairs.values(), default=-1) + 1)
  ]
  for link, saved_link in link_pairs.items():
    target[saved_link] = opt_state[link]
  expected = manifest_lib.describe({'opt_state': tuple(target)})
  present = {path: saved[path] for path in expected if path in saved}
  if differences := manifest_lib.difference(present, expected, cast=True):
    raise InputError(differences)
  return tuple(target)


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
