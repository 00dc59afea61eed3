"""Keeps the adapter of a run in a small folder, apart from its base parameters.

The folder has `adapter.safetensors`, the low-rank factors by name,
`adapter.json`, with the options of the adapter and the sha256 of the base
parameters that it was trained on, and the tokenizer of the run. An adapter is
read only if the parameters have that sha256 and no file has changed.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from moe_jax.config import read_options
from moe_jax.data import plain_files
from moe_jax.data.cache_folders import whole_folder
from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.models.lora import Adapters, LoraOptions, adapt
from moe_jax.models.trees import describe, flatten, unflatten
from moe_jax.partitioning import path_name
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.workdir import TOKENIZER
from moe_jax.training import trained

WEIGHTS, ABOUT = 'adapter.safetensors', 'adapter.json'
_FORMAT = 2


def digest(params: Mapping[str, Any]) -> str:
  """The sha256 of parameters: of their names, dtypes, shapes and bits.

  The host holds one layer of one array at a time.
  """
  sha = hashlib.sha256()
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for path, leaf in sorted(leaves, key=lambda item: path_name(item[0])):
    sha.update(f'{path_name(path)} {leaf.dtype} {leaf.shape}\n'.encode())
    for row in leaf if leaf.ndim else [leaf]:
      sha.update(np.ascontiguousarray(row).tobytes())
  return sha.hexdigest()


def save(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  step: int | None = None,
  allow: Iterable[str] = (),
) -> str:
  """Writes the adapter of a run as a folder; returns a line about it.

  Args:
    workdir: Folder of a run with `config.lora`.
    output: A folder that is new or empty.
    step: Step of the checkpoint; None is the newest good one.
    allow: Modules whose classes, named in the run's folder, may be imported.

  Raises:
    ValueError: The folder holds no run with an adapter; the model has router
      state, which training changes but an adapter does not store; or `output`
      is not empty.
    CheckpointError: No checkpoint is good.
  """
  model, own, params, trained_step = _load(workdir, step, allow)
  if not own.kernels or not trained_step:
    raise InputError(
      f'{workdir} holds no trained adapter: lora.rank={own.options.rank}, '
      f'step {trained_step}'
    )
  _check_stateless(model)
  names = {'/'.join(path): leaf for path, leaf in flatten(params).items()}
  factors = {name: np.asarray(names[name]) for name in sorted(own.names)}
  about: dict[str, Any] = {
    'format': _FORMAT,
    'lora': dataclasses.asdict(own.options),
    'base': digest(own.base(params)),
    'step': trained_step,
  }
  folder = pathlib.Path(output).expanduser()
  with whole_folder(folder) as unfinished:
    save_file(factors, unfinished / WEIGHTS)
    if (tokenizer := workdir_lib.folder_of(workdir) / TOKENIZER).exists():
      shutil.copyfile(tokenizer, unfinished / TOKENIZER)
    about['sha256'] = _seal(about, unfinished)
    text = json.dumps(about, indent=2, sort_keys=True) + '\n'
    (unfinished / ABOUT).write_text(text, encoding='utf-8')
  size = sum(factor.nbytes for factor in factors.values())
  return (
    f'adapter of step {trained_step} written to {folder}: {len(factors)} '
    f'factors, {size / 2**20:,.1f} MiB'
  )


def read(
  folder: str | os.PathLike[str], model: Model, params: Mapping[str, Any]
) -> tuple[Adapters, dict[str, Any]]:
  """Reads an adapter onto the parameters that it was trained on.

  Args:
    folder: A folder that `save` wrote.
    model: The model.
    params: The parameters of the model, without adapters.

  Returns:
    The adapters, and the parameters with the adapters' factors added.

  Raises:
    ValueError: The folder holds no adapter, or an adapter of other parameters.
  """
  path = pathlib.Path(folder).expanduser()
  about = plain_files.read_json(path / ABOUT)
  if not about:
    raise InputError(f'{path} holds no adapter: it has no {ABOUT}')
  if (version := about.get('format')) != _FORMAT:
    raise InputError(
      f'{path} has format {version!r}, not {_FORMAT}; write it again by '
      '`python -m moe_jax.finetuning save`'
    )
  if about.pop('sha256', None) != _seal(about, path):
    files = f'{ABOUT}, {WEIGHTS} or {TOKENIZER}'
    raise InputError(f'{path} is damaged: {files} is not as it was written')
  if (base := about['base']) != (params_digest := digest(params)):
    raise InputError(
      f'{path} is an adapter of the base with sha256 {base:.12}; these '
      f'parameters have {params_digest:.12}'
    )
  options = read_options(LoraOptions, about['lora'], 'lora.')
  adapters = adapt(options, describe(model))
  factors = load_file(path / WEIGHTS)
  tree = {tuple(name.split('/')): jnp.asarray(x) for name, x in factors.items()}
  return adapters, {**params, **unflatten(tree)}


def merge(
  folder: str | os.PathLike[str],
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  step: int | None = None,
  allow: Iterable[str] = (),
) -> str:
  """Writes a run's folder with a saved adapter merged into the base's weights.

  Like the folder of an imported model, the new folder has a checkpoint of step
  0 with parameters alone, and serves for generation, export and training. It
  has the tokenizer of the adapter's run, and so its EOS after inputs.

  Args:
    folder: The adapter's folder.
    workdir: Folder of the run that is the adapter's base.
    output: A folder that is new or empty.
    step: Step of the base's checkpoint; None is the newest good one.
    allow: Modules whose classes, named in the run's folder, may be imported.

  Returns:
    A line about the new folder.

  Raises:
    ValueError: `folder` holds no adapter, or one of other parameters; or
      `workdir` holds no run; the base has adapters or router state; or `output`
      is not empty.
    CheckpointError: No checkpoint is good.
  """
  model, own, params, base_step = _load(workdir, step, allow)
  base = pathlib.Path(workdir).expanduser()
  if base_step and own.kernels:
    raise InputError(
      f'{workdir} has an adapter itself, which every reader of the run '
      'merges; give the folder of its base, or step 0 of an imported one that '
      'still has it'
    )
  _check_stateless(model)
  adapters, params = read(folder, model, params)
  merged = adapters.merged_on_devices(params)
  kept = pathlib.Path(folder).expanduser() / TOKENIZER
  tokenizer = kept if kept.exists() else None  # older adapters have none
  new_folder = trained.derive(base, output, merged, tokenizer=tokenizer)
  return (
    f'step {base_step} of {base} with the adapter of {folder} is in '
    f'{new_folder}; its data and task are those of the base, its tokenizer is '
    "that of the adapter's run"
  )


def _seal(about: Mapping[str, Any], folder: pathlib.Path) -> str:
  """The sha256, in hex, of an adapter's values, factors and tokenizer.

  `about` has the values of `adapter.json` but the sha256 itself; `folder` has
  the files of the factors and of the tokenizer, if there is one.
  """
  sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  for path in (folder / WEIGHTS, folder / TOKENIZER):
    sha.update(path.read_bytes() if path.exists() else b'')
  return sha.hexdigest()


def _load(workdir, step, allow) -> tuple[Model, Adapters, dict[str, Any], int]:
  """A run's model, its adapters if it has any, the parameters, their step.

  Parameters include the adapters' factors, which are not merged into kernels.

  Args:
    workdir: The run's folder.
    step: Step of the checkpoint; None is the newest good one.
    allow: Modules whose classes, named in the run's folder, may be imported.
  """
  run = trained.read(workdir, allow, tokenizer_needed=False)
  rules = run.sharding.rules
  model = run.model.build(rules)
  adapters = trained.adapters_of(workdir, model)
  restored = trained.restore_variables(
    workdir, model, rules, adapters=adapters, step=step, router_state=False
  )
  return model, adapters, restored.state['params'], restored.step


def _check_stateless(model: Model) -> None:
  if model.stacks.keeps_router_state:
    raise InputError(
      'the routers of this model keep state, which training moves and an '
      'adapter does not hold; keep the folder of the run'
    )
