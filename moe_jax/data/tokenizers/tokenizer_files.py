"""Tokenizers that exist already: a run's, another library's, or fitted ones."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable

from moe_jax.config import option, required
from moe_jax.data import plain_files
from moe_jax.data.contracts import Tokenizer, TokenizerOptions, load
from moe_jax.data.tokenizers.extra_ids import without_endings
from moe_jax.data.tokenizers.json_tokenizer import Json
from moe_jax.data.tokenizers.sentencepiece_tokenizer import SentencePiece
from moe_jax.errors import InputError

_READS = (
  'a folder of a run or of a Hugging Face model, a tokenizer.json, or a '
  'SentencePiece model'
)


def read(path: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer of a run, of a Hugging Face model or of SentencePiece.

  A folder's `tokenizer.json` is read, or else its only `*.model`. The tokenizer
  of a run has the ids that the run's task added, not the EOS that the task put
  after inputs.

  Raises:
    ValueError: There is no such file, or there are several; or the file is
      damaged, too large, or a link out of its folder.
  """
  path = pathlib.Path(path).expanduser()
  folder = path if path.is_dir() else None
  if folder is not None:
    path = _file_of(folder)
  elif not path.is_file():
    raise InputError(f'no file {path} in {os.getcwd()}; give {_READS}')
  content = plain_files.read_bytes(path)
  if path.suffix != '.json' and content[:1] != b'{':
    try:
      return SentencePiece(content)
    except InputError as error:
      reason = f'{path} is {error}; give the path of {_READS}'
      raise InputError(reason) from None
  text = plain_files.read_text(path)
  values = plain_files.parse_json(text, path)
  if isinstance(values, dict) and 'kind' in values:
    return without_endings(load(path))
  if folder is not None:
    return Json.from_folder(folder)
  try:
    return Json(text)
  except InputError as error:
    raise InputError(f'{path}: {plain_files.first_line(error)}') from None


def _file_of(folder: pathlib.Path) -> pathlib.Path:
  if path := plain_files.plain(folder, 'tokenizer.json'):
    return path
  models = list(plain_files.matching(folder, ['*.model']))
  if len(models) == 1:
    return models[0]
  if models:
    names = ', '.join(model.name for model in models)
    raise InputError(f'{folder} has several models, {names}; give one of them')
  names = sorted(path.name for path in folder.iterdir())
  raise InputError(
    f'{folder} has no tokenizer.json and no *.model, only {names!s:.200}; give '
    f'the path of {_READS}'
  )


class GivenOptions(TokenizerOptions):
  """Contract of the options of a tokenizer that depends on no texts."""

  @required
  def given(self) -> Tokenizer:
    """The tokenizer of these options, which is read anew at each call.

    Raises:
      ValueError: A file is missing or bad.
    """

  def identity(self) -> str:
    """Text that tells the tokenizer of these options from all others."""
    return self.given().identity

  def fit(self, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of these options, which does not depend on the texts."""
    return self.given()

  def known_vocab_size(self) -> int:
    return self.given().vocab_size


@dataclasses.dataclass(frozen=True)
class Fitted(GivenOptions):
  """A tokenizer that exists already, in place of options that would make it.

  Attributes:
    tokenizer: The tokenizer.
    replaced: The options that the tokenizer replaces, under which tokens may be
      in the cache; None if it replaces no options.
  """

  tokenizer: Tokenizer
  replaced: TokenizerOptions | None = dataclasses.field(
    default=None, compare=False
  )

  def given(self) -> Tokenizer:
    return self.tokenizer


@dataclasses.dataclass(frozen=True)
class FileOptions(GivenOptions):
  """Options of a tokenizer that exists already, in a file or a folder."""

  path: str = option(
    dataclasses.MISSING,
    "Path of a tokenizer: a run's folder or its tokenizer.json, the folder of "
    'a Hugging Face model or its tokenizer.json, or a SentencePiece model, '
    'such as tokenizer.model or spiece.model.',
    required=True,
  )

  def given(self) -> Tokenizer:
    try:
      return read(self.path)
    except InputError as error:
      raise InputError(f'tokenizer file: {error}') from None


class JsonOptions(FileOptions):
  """`FileOptions` under the kind 'json', as in runs of imported models."""
