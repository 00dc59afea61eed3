"""Checkpoints into a run's folder, from where training goes on, and out of it.

An imported folder holds a checkpoint of step 0 with parameters alone, the
run's config (and `config.py`, by which `moe_jax.main` is told of it), the
tokenizer, and the files that came with the weights in `huggingface/`.
"""

import fnmatch
import json
import os
import pathlib
import resource
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from flax import linen as nn

from moe_jax import command_line, models, partitioning
from moe_jax.config import difference, merge
from moe_jax.data import tokenizers
from moe_jax.interop import hub, loading
from moe_jax.interop.checkpoint_folder import Checkpoint
from moe_jax.interop.model_section import overrides
from moe_jax.interop.saving import save
from moe_jax.interop.tensor_files import TensorFiles
from moe_jax.layers.initializers import axis_names
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer

FILES = 'huggingface'
BASE = 'configs/base.py'
_CONFIG_PY = '''"""{source}, imported by `python -m moe_jax.interop import`.

    python -m moe_jax.main --config={workdir}/config.py --workdir={workdir}
"""

from moe_jax import command_line

CHANGES = {{
{changes}
}}


def get_config():
  config = command_line.load_config({base!r})
  config.update_from_flattened_dict(CHANGES)
  return config
'''


def import_run(
  source: str | os.PathLike[str],
  workdir: str | os.PathLike[str],
  *,
  config: ml_collections.ConfigDict,
  base: str = BASE,
  dtype: str = '',
  revision: str = '',
  devices: Sequence[jax.Device] | None = None,
) -> list[str]:
  """Makes a run's folder of a checkpoint; returns what there is to say.

  Args:
    source: A folder, or the id of a hub repository.
    workdir: A folder that holds no run yet.
    config: The run's: all but the model is taken from it.
    base: Where `config` came from; `config.py` begins with it.
    dtype: Of parameters and products; '': as the checkpoint's.
    revision: Of a repository.
    devices: Of the mesh; None is all there are.

  Raises:
    ValueError: As `load`; the halves' embeddings differ; the folder holds a
      run; or the tokenizer is not one of ours.
  """
  folder = pathlib.Path(workdir).expanduser()
  for name in (workdir_lib.CONFIG, workdir_lib.CHECKPOINTS):
    if (folder / name).exists():
      raise ValueError(f'{folder} holds a run already ({name}); choose another')
  tokenizer = _tokenizer(hub.fetch(source, weights=False, revision=revision))
  checkpoint = loading.fetch(source, dtype=dtype, revision=revision)
  if checkpoint.encoder_table:
    raise ValueError(
      f'{source}: encoder and decoder have embeddings that differ, and a run '
      'has one for both; interop.load reads it'
    )
  config = _run_config(config, checkpoint, folder, tokenizer)
  mesh = partitioning.make_mesh(config.mesh.to_dict(), devices)
  before = _peak_bytes()
  params = loading.load_params(checkpoint, mesh=mesh, sharding=config.sharding)
  facts = [_size(params, mesh), _memory(before, checkpoint)]
  _write(folder, checkpoint, config, base, tokenizer, params)
  return [*facts, *checkpoint.notes, *_next(folder, tokenizer)]


def _tokenizer(folder: pathlib.Path) -> tokenizers.Json | None:
  """The folder's; None where there is none at all."""
  names = ('tokenizer.json', *tokenizers.SENTENCEPIECE)
  if not any((folder / name).is_file() for name in names):
    return None
  return tokenizers.Json.from_folder(folder)


def _run_config(config, checkpoint: Checkpoint, folder, tokenizer):
  """The run's config with the checkpoint's model, tokenizer and a task."""
  changes: dict[str, Any] = {'model': overrides(checkpoint.section)}
  data = {}
  if tokenizer is not None:
    data['tokenizer'] = f'json:{folder / FILES}'
  pairs = checkpoint.section.kind == 'encoder_decoder'
  if pairs and config.data.task == 'lm':
    data |= _task(config, checkpoint, tokenizer)
  return merge(config, {**changes, 'data': data} if data else changes)


def _task(config, checkpoint: Checkpoint, tokenizer) -> dict[str, Any]:
  """What an encoder-decoder can be trained on at once, embedded.

  A T5 vocabulary has tokens for gaps, which the model learned to fill.
  """
  task = dict(target_len=max(config.data.seq_len // 4, 1))
  gaps = len(tokenizer.sentinel_ids) if tokenizer is not None else 0
  if gaps and checkpoint.architecture.model_type == 'switch_transformers':
    sentinels = min(gaps, config.data.num_sentinels)
    return dict(
      task, task='span_corruption', final_sentinel=False,
      num_sentinels=sentinels,
    )  # fmt: skip
  return dict(task, task='seq2seq', source='python_stdlib_docstrings')


def _write(folder, checkpoint, config, base, tokenizer, params) -> None:
  """The config last: what has none is no run."""
  files = folder / FILES
  files.mkdir(parents=True)
  for path in checkpoint.folder.iterdir():
    small = any(fnmatch.fnmatch(path.name, pattern) for pattern in hub.SMALL)
    if path.is_file() and small and not path.name.endswith('.index.json'):
      shutil.copyfile(path, files / path.name)
  if tokenizer is not None:
    tokenizer.save(folder / workdir_lib.TOKENIZER)
  with Checkpointer(folder / workdir_lib.CHECKPOINTS, keep_best=False) as kept:
    extra = {'imported': checkpoint.architecture.model_type}
    kept.save(0, {'params': params}, extra=extra)
  changes = difference(command_line.load_config(base), config)
  text = _CONFIG_PY.format(
    source=checkpoint.folder.name,
    workdir=folder,
    base=base,
    changes='\n'.join(f'  {k!r}: {new!r},' for k, (_, new) in changes.items()),
  )
  (folder / 'config.py').write_text(text, encoding='utf-8')
  workdir_lib.claim(folder, config)


def _size(params, mesh) -> str:
  leaves = jax.tree.leaves(params)
  count, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
  return (
    f'{count:,} parameters, {size / 2**20:,.1f} MiB, on {mesh.size} x '
    f'{mesh.devices.flat[0].device_kind}'
  )


def _memory(before: int, checkpoint: Checkpoint) -> str:
  peak, largest = _peak_bytes(), TensorFiles(checkpoint.folder).largest
  on_host = jax.devices()[0].platform == 'cpu'
  return (
    f'peak host memory {peak / 2**20:,.1f} MiB, {before / 2**20:,.1f} MiB '
    f'before the parameters{" (which are in it here)" if on_host else ""}; '
    f'largest tensor {largest / 2**20:,.1f} MiB'
  )


def _peak_bytes() -> int:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak


def _next(folder, tokenizer) -> list[str]:
  without = (
    'the checkpoint came without a tokenizer; data.tokenizer is as it was'
  )
  return [
    *([] if tokenizer is not None else [without]),
    f'go on: python -m moe_jax.main --config={folder}/config.py '
    f'--workdir={folder}; with other settings, add --resume',
  ]


def export_run(
  workdir: str | os.PathLike[str], output: str | os.PathLike[str]
) -> list[str]:
  """Writes a run's newest good checkpoint for transformers to read.

  Returns:
    What there is to say.

  Raises:
    ValueError: The folder holds no run or no checkpoint, or as `save`.
    CheckpointError: No checkpoint is good.
  """
  folder = pathlib.Path(workdir).expanduser()
  path = folder / workdir_lib.CONFIG
  if not path.is_file():
    raise ValueError(f'{folder} holds no run: it has no {workdir_lib.CONFIG}')
  config = ml_collections.ConfigDict(tokenizers.read_json(path))
  if 'model' not in config or 'data' not in config:
    raise ValueError(f'{folder} holds no run: {path.name} is not one of a run')
  path = folder / workdir_lib.TOKENIZER
  tokenizer = tokenizers.load(path) if path.is_file() else None
  if not config.model.vocab_size and tokenizer is not None:
    config.model.vocab_size = tokenizer.vocab_size
  model = models.build(config)
  step, params = _restore(folder, config, model)
  files, output = folder / FILES, pathlib.Path(output).expanduser()
  known = tokenizers.read_json(files / 'config.json')
  save(model, {'params': params}, output, config=known or _special(tokenizer))
  return [
    f'checkpoint of step {step} written to {output}',
    _export_tokenizer(files, output, tokenizer),
  ]


def _restore(folder, config, model: nn.Module):
  """The newest good checkpoint's parameters, on the run's mesh if it fits."""
  boxed = models.abstract_params(model, config.data.seq_len)
  shapes = nn.meta.unbox(boxed)
  try:
    mesh = partitioning.make_mesh(config.mesh.to_dict())
  except ValueError:  # made for other devices; any mesh will do
    mesh = partitioning.make_mesh(dict(data=1), jax.local_devices()[:1])
  rules = partitioning.make_rules(config.sharding)
  places = partitioning.tree_shardings(mesh, rules, axis_names(boxed), shapes)
  abstract = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    places,
  )
  path = workdir_lib.checkpoints_of(folder)
  with Checkpointer(path, keep_best=False) as kept:
    restored = kept.restore({'params': abstract}, partial=True)
  if restored is None:
    raise ValueError(f'{path} has no checkpoint yet')
  return restored.step, restored.state['params']


def _special(tokenizer) -> dict[str, Any]:
  """The ids that a run's own tokenizer has."""
  if tokenizer is None:
    return {}
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
    'decoder_start_token_id': tokenizer.start_id,
  }


def _export_tokenizer(files, output, tokenizer) -> str:
  """Copies what was imported, else writes what a JSON tokenizer holds."""
  if files.is_dir():
    for path in files.iterdir():
      if path.name != 'config.json':
        shutil.copyfile(path, output / path.name)
    return f"the imported checkpoint's other files are there too, from {files}"
  if isinstance(tokenizer, tokenizers.Extended):
    tokenizer = tokenizer.base
  if not isinstance(tokenizer, tokenizers.Json):
    return 'transformers has no such tokenizer; the folder has none'
  (output / 'tokenizer.json').write_text(tokenizer.model_json())
  names = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  for role in ('bos', 'eos', 'pad'):
    token = getattr(tokenizer, f'{role}_id')
    if token is not None:
      names[f'{role}_token'] = tokenizer.vocabulary_name(token)
  text = json.dumps(names, indent=2)
  (output / 'tokenizer_config.json').write_text(text + '\n')
  return 'the tokenizer is there too'
