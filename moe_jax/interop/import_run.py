"""Import of a checkpoint as a run's folder, which can be trained further."""

import dataclasses
import os
import pathlib
import shlex
import shutil
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import jax

from moe_jax import cli
from moe_jax.config import Options, fields_of, section_of
from moe_jax.data import (
  TOKENIZERS,
  DataOptions,
  DocstringsSource,
  FileOptions,
  JsonOptions,
  Seq2SeqTask,
  SpanCorruptionTask,
  plain_files,
  tokenizers,
)
from moe_jax.data.cache_folders import check_free, whole_folder
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.tokenizers.json_tokenizer import SENTENCEPIECE_FILES
from moe_jax.errors import InputError
from moe_jax.interop import loading
from moe_jax.interop.checkpoint_folder import (
  Checkpoint,
  fetch_folder,
  small_files,
)
from moe_jax.models import ModelOptions
from moe_jax.runs.workdir import CONFIG_PY, IMPORTED, TOKENIZER
from moe_jax.training import trained
from moe_jax.training.run_options import RunOptions

O = TypeVar('O', bound=Options)


def import_run(
  source: str | os.PathLike[str],
  workdir: str | os.PathLike[str],
  options: RunOptions,
  *,
  dtype: str = '',
  revision: str = '',
  devices: Sequence[jax.Device] | None = None,
) -> list[str]:
  """Makes a run's folder from a checkpoint.

  Args:
    source: A folder, or the id of a hub repository.
    workdir: A folder that is new or empty.
    options: The options of the run, except for the function that the model
      computes, which the checkpoint decides.
    dtype: Dtype of parameters and products; '' is the checkpoint's own.
    revision: A branch, tag or commit of a repository; '' is its main branch.
    devices: The devices of the mesh; None is all devices.

  Returns:
    Lines about the import, for printing.

  Raises:
    ValueError: `load` refuses the checkpoint; `workdir` is not empty; the
      tokenizer cannot be read, or has tokens for which the model has no
      embedding; or a config or tokenizer file is a link out of its folder.
  """
  folder = pathlib.Path(workdir).expanduser().resolve()
  check_free(folder)
  config_folder = fetch_folder(source, weights=False, revision=revision)
  data = options.data
  tokenizer, notes = _tokenizer(config_folder, data)
  checkpoint = loading.fetch(source, dtype=dtype, revision=revision)
  other_files = small_files(checkpoint.folder)
  _check_vocabulary(tokenizer, checkpoint)
  model = _model(checkpoint.options, options.model)
  checkpoint = dataclasses.replace(checkpoint, options=model)
  options = dataclasses.replace(
    options,
    model=model,
    data=_fitting_data(data, checkpoint, folder, tokenizer),
  )
  mesh = options.mesh.make(devices)
  with whole_folder(folder) as unfinished:
    variables = loading.load_variables(
      checkpoint, mesh=mesh, rules=options.sharding.rules
    )
    (unfinished / IMPORTED).mkdir()
    for path in other_files:
      shutil.copyfile(path, unfinished / IMPORTED / path.name)
    if tokenizer is not None:
      tokenizer.save(unfinished / TOKENIZER)
    metadata = {'imported': checkpoint.architecture.model_type}
    trained.write(unfinished, section_of(options), variables, metadata)
  leaves = jax.tree.leaves(variables['params'])
  count, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
  return [
    f'{count:,} parameters, {size / 2**20:,.1f} MiB, on {mesh.size} x '
    f'{mesh.devices.flat[0].device_kind}',
    *checkpoint.notes,
    *notes,
    *_advice(folder, tokenizer),
  ]


def _tokenizer(
  folder: pathlib.Path, data: DataOptions
) -> tuple[Tokenizer | None, list[str]]:
  """The tokenizer.json of a folder, or else the file that the config names.

  A folder with only a SentencePiece model is refused if the config names no
  file, since transformers may give the model's pieces other ids.

  Returns:
    The tokenizer, None if there is neither, and a line if the config's file is
    not used.
  """
  names_file = isinstance(data.tokenizer, FileOptions)
  has_json = plain_files.plain(folder, 'tokenizer.json') is not None
  if names_file and not has_json:
    return data.tokenizer.fit([]), []
  line = (
    'the tokenizer is the tokenizer.json of the checkpoint; data.tokenizer.kind'
    f'={TOKENIZERS.name_of(data.tokenizer)!r} is not used'
  )
  names = SENTENCEPIECE_FILES
  if not has_json and not any(plain_files.plain(folder, n) for n in names):
    return None, []
  return tokenizers.Json.from_folder(folder), [line] * names_file


def _model(imported: ModelOptions, configured: ModelOptions) -> ModelOptions:
  """The checkpoint's model options, with a run's options on computation.

  These say how the same function is computed or trained. Dtypes are the
  checkpoint's, and so are rates of dropout and weights of losses that are not
  the defaults.
  """
  model: Any = _computed_as(imported, configured)
  stored_numerics = cast(Any, imported).numerics
  numerics = dataclasses.replace(
    model.numerics,
    dtype=stored_numerics.dtype,
    param_dtype=stored_numerics.param_dtype,
  )
  return dataclasses.replace(model, numerics=numerics)


def _computed_as(imported: O, configured: Options, how: bool = False) -> O:
  """The imported options, with the run's values of options on computation.

  Options on computation are those with `Option.same_function`. If one has
  another value than its default in `imported`, that value is kept.

  Args:
    imported: The options of the checkpoint.
    configured: The options of the run, of which some may have the same names.
    how: Whether all options of `imported` are options on computation.
  """
  changes = {}
  for name, field in fields_of(type(imported)).items():
    old, new = getattr(imported, name), getattr(configured, name, None)
    only_how = how or field.option.same_function
    if isinstance(old, Options):
      if type(old) is type(new):
        changes[name] = _computed_as(old, cast(Options, new), only_how)
    elif only_how and old == field.default and new is not None:
      changes[name] = new
  return dataclasses.replace(cast(Any, imported), **changes)


def _fitting_data(
  data: DataOptions,
  checkpoint: Checkpoint,
  folder: pathlib.Path,
  tokenizer: Tokenizer | None,
) -> DataOptions:
  """The options of data, with the tokenizer in `folder` and a fitting task.

  If the task has no inputs and targets, an encoder-decoder gets another task:
  span corruption if the model was trained on it, or else pairs of inputs and
  targets made of docstrings that come with Python.
  """
  changes: dict[str, Any] = {}
  if tokenizer is not None:
    tokenizer_file = plain_files.plain(checkpoint.folder, 'tokenizer.json')
    changes['tokenizer'] = (
      JsonOptions(str(folder / IMPORTED))
      if tokenizer_file
      else FileOptions(str(folder / TOKENIZER))
    )
  if checkpoint.options.has_encoder and not data.task.makes_examples:
    changes['target_len'] = max(data.seq_len // 4, 1)
    num_sentinels = len(tokenizer.sentinel_ids) if tokenizer is not None else 0
    if num_sentinels and checkpoint.architecture.fills_gaps:
      max_sentinels = SpanCorruptionTask().num_sentinels
      changes['task'] = SpanCorruptionTask(
        num_sentinels=min(num_sentinels, max_sentinels), final_sentinel=False
      )
    else:
      changes |= {'task': Seq2SeqTask(), 'source': DocstringsSource()}
  return dataclasses.replace(data, **changes)


def _check_vocabulary(
  tokenizer: Tokenizer | None, checkpoint: Checkpoint
) -> None:
  if tokenizer is None:
    return
  size = checkpoint.options.vocab_size
  num_tokens = getattr(tokenizer, 'num_tokens', tokenizer.vocab_size)
  if num_tokens > size:
    name = getattr(tokenizer, 'vocabulary_name', tokenizer.token_name)(size)
    raise InputError(
      f'{checkpoint.folder}: the tokenizer has ids up to {num_tokens - 1} '
      f'({name!r} is the first of the last {num_tokens - size}), the model has '
      f'embeddings for vocab_size={size} only'
    )


def _advice(folder: pathlib.Path, tokenizer: Tokenizer | None) -> list[str]:
  """Lines on the command that trains the imported run further."""
  command = (
    f'go on: {cli.program("moe_jax.main")} '
    f'--config={shlex.quote(str(folder / CONFIG_PY))} '
    f'--workdir={shlex.quote(str(folder))}'
  )
  if tokenizer is not None:
    return [f'{command}; with other settings, add --resume']
  flags = (
    '--config.data.tokenizer.kind=file --config.data.tokenizer.file.path='
    'TOKENIZER'
  )
  return [
    'the checkpoint came without a tokenizer, and its ids have no text; '
    'TOKENIZER is to be the path of its own: a tokenizer.json, a SentencePiece '
    f'model, or a folder with one. An import with {flags} keeps it with the '
    'run, which can then generate',
    f'{command} --resume {flags}',
  ]
