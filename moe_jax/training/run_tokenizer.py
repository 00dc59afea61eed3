"""The tokenizer that a run takes in place of its config's.

Not here: kinds of tokenizers (`data/tokenizers`).
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TypeVar

from moe_jax import data, sections
from moe_jax.data import tokenizers
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.run_options import RunOptions

R = TypeVar('R', bound=RunOptions)


def with_tokenizer(options: R, folder: pathlib.Path) -> R:
  """The options with the tokenizer that a run takes in place of the config's.

  It is that of the run that this one begins with; or that which this run has
  kept, where the config's cannot be read any more.

  Args:
    options: The options of the run.
    folder: The folder of the run, which need not exist.

  Raises:
    ValueError: The tokenizer cannot be read.
  """
  taken = options.init_from.with_tokenizer(options.data, folder)
  if taken is options.data:
    try:
      options.data.tokenizer.identity()
    except ValueError:
      if not _began_with(options, folder):
        raise
      kept = tokenizers.read(folder / workdir_lib.TOKENIZER)
      taken = options.data.with_tokenizer(kept)
  if taken is options.data:
    return options
  return dataclasses.replace(options, data=taken)


def _began_with(options: RunOptions, folder: pathlib.Path) -> bool:
  """Whether a folder has the tokenizer that the options name."""
  if not (folder / workdir_lib.TOKENIZER).is_file():
    return False
  before = workdir_lib.kept_config(folder).get('data', {}).get('tokenizer')
  now = sections.section(options).to_dict()['data']['tokenizer']
  return before == now


def tokenizer_notes(given: RunOptions, options: RunOptions) -> Iterator[str]:
  """A line about a tokenizer that is taken in place of the config's.

  Args:
    given: The options as they were given.
    options: The options `with_tokenizer`.
  """
  if options.data is given.data:
    return
  try:
    same = given.data.tokenizer.identity()
    if same == options.data.tokenizer.identity():
      return
    problem = ''
  except ValueError as error:
    problem = str(error)
  other = given.init_from
  if not (other.workdir and other.keep_tokenizer):
    yield f'tokenizer: that which the run has kept; {problem}'
    return
  kind = data.TOKENIZERS.name_of(given.data.tokenizer)
  yield (
    f'tokenizer: that of {other.workdir}; data.tokenizer.kind={kind!r} is not '
    'used (init_from.keep_tokenizer)'
  )
