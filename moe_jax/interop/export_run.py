"""Export of a run's checkpoint and tokenizer as a folder for transformers."""

import os
import pathlib
from typing import Any, cast

import jax

from moe_jax import sections
from moe_jax.data import plain_files, tokenizers
from moe_jax.data.cache_folders import whole_folder
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError
from moe_jax.interop import exported_tokenizer, hub
from moe_jax.interop.checkpoint_folder import architecture_of
from moe_jax.interop.saving import save
from moe_jax.models import code_trees
from moe_jax.models.expert_arrays import has_merged
from moe_jax.partitioning import MeshOptions
from moe_jax.runs import trained
from moe_jax.runs import workdir as workdir_lib


def export_run(
  workdir: str | os.PathLike[str], output: str | os.PathLike[str]
) -> list[str]:
  """Writes a run's newest good checkpoint for transformers to read.

  Kernels in codes of few bits are written as the numbers that these stand for.

  Returns:
    Lines about the export, for printing.

  Raises:
    ValueError: The folder holds no run or no checkpoint, or as `save`.
    CheckpointError: No checkpoint is good.
  """
  folder = pathlib.Path(workdir).expanduser()
  run = trained.read(folder, tokenizer_needed=False)
  rules = run.sharding.rules
  restored = trained.restore_variables(
    folder,
    run.model.build(rules),
    rules,
    mesh=_mesh(folder),
  )
  imported_folder, output = (
    folder / workdir_lib.IMPORTED,
    pathlib.Path(output).expanduser(),
  )
  imported_config = plain_files.read_json(imported_folder / 'config.json')
  config = imported_config or _special_ids(run.tokenizer)
  imported_files = _imported_files(imported_folder)
  model, params, lines = run.model, restored.state['params'], []
  if code_trees.has_codes(model):
    model, params = code_trees.decoded(cast(Any, model), params)
    lines = ['kernels in codes were written as numbers']
  if has_merged(run.model.build(rules)):
    lines.append(
      'columns of routers lead to the same experts, of which transformers '
      'needs a copy for each: the bytes are those of all columns, and do not '
      'fall'
    )
  with whole_folder(output) as unfinished:
    variables = {**restored.state, 'params': params}
    save(model, variables, unfinished, config=config)
    target = architecture_of(plain_files.read_json(unfinished / 'config.json'))
    tokenizer_line = _export_tokenizer(
      imported_files, unfinished, run.tokenizer
    )
  if target.needs_code:
    lines.append(
      f'it is written as {target.model_type}, for which transformers has no '
      'class: copy the published configuration and modeling files to the '
      'folder, and name them in auto_map of config.json'
    )
  return [
    f'checkpoint of step {restored.step} written to {output}',
    *lines,
    tokenizer_line,
  ]


def _imported_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files that came with an imported checkpoint, besides its config."""
  if folder.is_symlink():
    raise InputError(f'{folder} is a link, which is not followed')
  if not folder.is_dir():
    return []
  paths = hub.small_files(folder)
  # Some file systems do not tell upper from lower case.
  return [path for path in paths if path.name.casefold() != 'config.json']


def _mesh(folder: pathlib.Path) -> jax.sharding.Mesh | None:
  """The run's mesh; None if it does not fit the devices."""
  mesh = workdir_lib.kept_config(folder).get('mesh', {})
  try:
    return sections.read(MeshOptions, mesh, 'mesh.').make()
  except InputError:
    return None


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
  """The keys of config.json that a run's own tokenizer decides."""
  if tokenizer is None:
    return {}
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
    'decoder_start_token_id': tokenizer.start_id,
  }


def _export_tokenizer(
  imported: list[pathlib.Path],
  output: pathlib.Path,
  tokenizer: Tokenizer | None,
) -> str:
  """Copies files that were imported, or else writes the run's tokenizer.

  Returns a line about it, for printing.
  """
  for path in imported:
    plain_files.copy(path, output / path.name)
  if imported:
    names = ', '.join(path.name for path in imported)
    line = f"the imported checkpoint's other files are there too: {names}"
    if isinstance(tokenizer, tokenizers.Extended) and tokenizer.names:
      line += '; they are without the ids that the task added'
    return line
  return exported_tokenizer.write(tokenizer, output)
