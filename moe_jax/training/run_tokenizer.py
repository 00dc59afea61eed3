"""The tokenizer that a run takes in place of its config's."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TypeVar

from moe_jax import data, sections
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.run_options import RunOptions

R = TypeVar('R', bound=RunOptions)


def with_tokenizer(options: R, folder: pathlib.Path) -> R:
  """The options with the tokenizer that a run takes in place of the config's.

  It is the tokenizer of the run that this one begins with, or the one in this
  run's folder where that of the config cannot be read any more.

  Args:
    options: The options of the run.
    folder: The folder of the run, which need not exist.

  Raises:
    ValueError: The tokenizer cannot be read.
  """
  data_options = options.init_from.with_tokenizer(options.data, folder)
  if data_options is options.data:
    try:
      options.data.tokenizer.identity()
    except InputError:
      if not _began_with(options, folder):
        raise
      tokenizer = tokenizers.read(folder / workdir_lib.TOKENIZER)
      data_options = options.data.with_tokenizer(tokenizer)
  if data_options is options.data:
    return options
  return dataclasses.replace(options, data=data_options)


def _began_with(options: RunOptions, folder: pathlib.Path) -> bool:
  """Whether a folder has the tokenizer that the options name."""
  if not (folder / workdir_lib.TOKENIZER).is_file():
    return False
  stored = workdir_lib.kept_config(folder).get('data', {}).get('tokenizer')
  current = sections.section(options).to_dict()['data']['tokenizer']
  return stored == current


def check_kept_ids(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
  """Checks that ids mean what they mean to the parameters in a run's folder.

  The task of the data may add ids after those of the tokenizer in the folder.
  A file that cannot be read, as a kill of older code left one, says nothing.

  Args:
    folder: The folder of the run.
    tokenizer: The tokenizer of the data.

  Raises:
    ValueError: The folder has a tokenizer whose ids are others.
  """
  path = folder / workdir_lib.TOKENIZER
  try:
    kept = tokenizers.load(path)
  except (OSError, InputError):
    return
  (old, old_names), (new, new_names) = map(_with_names, (kept, tokenizer))
  if old == new and new_names[: len(old_names)] == old_names:
    return
  raise InputError(
    f'{folder} has parameters of tokens of {kept.ids_identity}, the data is of '
    f"{tokenizer.ids_identity}; give data.tokenizer.kind='file' and {path} as "
    'data.tokenizer.file.path'
  )


def _with_names(tokenizer: Tokenizer) -> tuple[str, tuple[str, ...]]:
  """The identity of a tokenizer's own ids, and the names that a task added."""
  if isinstance(tokenizer, tokenizers.Extended):
    return tokenizer.base.ids_identity, tokenizer.names
  return tokenizer.ids_identity, ()


def tokenizer_notes(
  given_options: RunOptions, options: RunOptions
) -> Iterator[str]:
  """A line about a tokenizer that is taken in place of the config's.

  Args:
    given_options: The options as they were given.
    options: The options `with_tokenizer`.
  """
  if options.data is given_options.data:
    return
  try:
    given_identity = given_options.data.tokenizer.identity()
    if given_identity == options.data.tokenizer.identity():
      return
    problem = ''
  except InputError as error:
    problem = str(error)
  init_from = given_options.init_from
  if not (init_from.workdir and init_from.keep_tokenizer):
    yield f'tokenizer: that which the run has kept; {problem}'
    return
  kind = data.TOKENIZERS.name_of(given_options.data.tokenizer)
  yield (
    f'tokenizer: that of {init_from.workdir}; data.tokenizer.kind={kind!r} is '
    'not used (init_from.keep_tokenizer)'
  )
