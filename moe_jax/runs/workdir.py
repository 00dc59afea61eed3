"""A run's folder: whose it is, and what is in it by name.

Not here: what the files hold (`checkpointer.py`, `metrics.py`).
"""

import json
import math
import os
import pathlib
from typing import Any

import jax
import ml_collections
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax import models, partitioning
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.layers.initializers import axis_names
from moe_jax.models import Model
from moe_jax.models.router_state import (
  abstract_router_state,
  init_router_state,
  variables,
)
from moe_jax.runs.checkpointer import Checkpointer, Restored

CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
TOKENIZER = 'tokenizer.json'


def check(
  workdir: str | os.PathLike[str],
  config: ml_collections.ConfigDict,
  *,
  resume: bool = False,
) -> pathlib.Path:
  """The folder, if `config` may have it; nothing is written.

  Args:
    workdir: A folder of this machine or mounted on it, which need not exist.
    config: What the run is.
    resume: Whether the folder of another config will do.

  Raises:
    ValueError: It is a URL or a file, its config cannot be read, or it is
      another run's: then the differences are listed, old before new. Or its
      checkpoints are elsewhere than `config` has them, or that is another's.
  """
  if '://' in os.fspath(workdir):
    raise ValueError(
      f'--workdir={workdir}: rows are appended to metrics, which buckets do '
      'not allow; give a folder, and the URL to checkpoint.directory'
    )
  folder = pathlib.Path(workdir).expanduser()
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'--workdir={folder} is a file; it must be a folder')
  changes = config_lib.difference(_kept(folder), _plain(config))
  if changes and (folder / CONFIG).exists() and not resume:
    listed = [f'  {key}: {a!r} -> {b!r}' for key, (a, b) in changes.items()]
    raise ValueError(
      f'{folder} holds another run; its config differs:\n'
      + '\n'.join(listed)
      + '\nchoose another --workdir, or go on in it with --resume'
    )
  _check_directory(folder, config, resume)
  return folder


def _check_directory(
  folder: pathlib.Path, config: ml_collections.ConfigDict, resume: bool
) -> None:
  """A run would begin anew, or go on from another's checkpoints, unasked."""
  there = (folder / CHECKPOINTS).exists() or (folder / CONFIG).exists()
  old, new = (checkpoints_of(folder, c) for c in (_kept(folder), config))
  if there and old != new:
    raise ValueError(
      f'{folder} has its checkpoints in {old}; checkpoint.directory='
      f'{config.checkpoint.directory!r} says otherwise, and cannot change'
    )
  if there or resume or not new.exists():
    return
  if any(True for _ in new.iterdir()):
    raise ValueError(
      f'{folder} is a new run and checkpoint.directory={os.fspath(new)!r} is '
      'not empty: it may be of another run; choose another, or go on from what '
      'is there with --resume'
    )


def checkpoints_of(
  folder: pathlib.Path, config: config_lib.Section | None = None
) -> epath.Path:
  """Where a run's checkpoints are; None is the config that its folder keeps."""
  if config is None:
    config = _kept(folder)
  # Runs of earlier versions have no such key.
  given = config.get('checkpoint', {}).get('directory', '')
  return epath.Path(given or folder / CHECKPOINTS)


def claim(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Makes a checked folder the config's own, making it if need be.

  Another config that it held is kept as `config.0.json`, `config.1.json`, ...

  Raises:
    OSError: The folder cannot be made or written.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / CONFIG
  if path.exists():
    if not config_lib.difference(_kept(folder), _plain(config)):
      return
    number = 0
    while (aside := folder / f'config.{number}.json').exists():
      number += 1
    path.rename(aside)
  text = json.dumps(_plain(config), indent=2, sort_keys=True)
  write_text(path, text + '\n')


def read(
  workdir: str | os.PathLike[str],
) -> tuple[ml_collections.ConfigDict, Tokenizer]:
  """What a run was: its config and tokenizer.

  The size of the vocabulary is filled in, and the shape of its examples where
  they are no text.

  Raises:
    ValueError: The folder holds no run, or one of the two cannot be read.
  """
  folder = pathlib.Path(workdir).expanduser()
  for name in (CONFIG, TOKENIZER):
    if not (folder / name).exists():
      raise ValueError(f'{folder} holds no trained run: it has no {name}')
  if not (checkpoints := checkpoints_of(folder)).exists():
    raise ValueError(f'{folder} holds no trained run: no {checkpoints.name}')
  tokenizer = tokenizers.load(folder / TOKENIZER)
  path = folder / CONFIG
  try:
    config = ml_collections.ConfigDict(json.loads(path.read_text('utf-8')))
    size = config.model.vocab_size or tokenizer.vocab_size
    filled: dict[str, Any] = {'vocab_size': size}
    if tokenizer.feature_shape:
      filled['feature_shape'] = list(tokenizer.feature_shape)
    return config_lib.merge(config, {'model': filled}), tokenizer
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path} is no config of a run: {error}') from error


def restore_variables(
  workdir: str | os.PathLike[str],
  model: Model,
  config: ml_collections.ConfigDict,
  *,
  mesh: Mesh | None = None,
  step: int | None = None,
  cast: bool = False,
  router_state: bool = True,
) -> Restored:
  """A run's variables, as `apply` takes them, sharded as they are read.

  These are 'params', and 'router_state' where the model keeps it. The
  checkpoint's files are verified first; the optimizer's state is not read.

  Args:
    workdir: The run's folder.
    model: Whose parameters they are to be, in its own types.
    config: Whose `data.seq_len` and sharding table count.
    mesh: Any; a dimension that does not divide by its mesh axes is whole.
      None: the first local device.
    step: The checkpoint; None: the newest good one.
    cast: Whether another floating-point type may have been saved.
    router_state: Whether that is read too.

  Raises:
    ValueError: There is no checkpoint, or it is of another model.
    CheckpointError: None is good.
  """
  folder = checkpoints_of(pathlib.Path(workdir).expanduser())
  boxed = models.abstract_params(model, config.data.seq_len)
  if mesh is None:
    mesh = partitioning.make_mesh(dict(data=1), jax.local_devices()[:1])
  rules = partitioning.make_rules(config.sharding.to_dict())
  abstract = jax.tree.map(
    lambda leaf, axes: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=_fitting(mesh, rules, axes, leaf.shape),
    ),
    nn.meta.unbox(boxed),
    axis_names(boxed),
  )
  kept = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=partitioning.sharding(mesh, rules, ())
    ),
    abstract_router_state(model, config.data.seq_len) if router_state else {},
  )
  with Checkpointer(folder, keep_best=False) as checkpoints:
    found = checkpoints.restore(
      variables(abstract, kept),
      step=step,
      partial=True,
      cast=cast,
      first={'params': abstract},
    )
  if found is None:
    raise ValueError(f'{folder} has no finished checkpoint')
  if kept and not found.step:  # parameters alone
    kept = init_router_state(model, config.data.seq_len)
    found = found._replace(state=variables(found.state['params'], kept))
  return found


def _fitting(mesh, rules, axes, shape) -> jax.sharding.NamedSharding:
  """By the table, but a dimension that does not divide is whole."""

  def parts(axis):
    return math.prod(mesh.shape[place] for place in rules.get(axis, ()))

  axes = [a if n % parts(a) == 0 else None for a, n in zip(axes, shape)]
  return partitioning.sharding(mesh, rules, axes, shape)


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Through JSON, so that tuples compare equal to what was written."""
  return json.loads(config.to_json_best_effort())


def _kept(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / CONFIG
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is damaged: {error}') from None


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a whole file or none of it."""
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_text(text, encoding='utf-8')
  unfinished.replace(path)
