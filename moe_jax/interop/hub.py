"""The folder of a checkpoint: a local one, or a download from the hub."""

import os
import pathlib
import re

import huggingface_hub

from moe_jax.data import plain_files
from moe_jax.errors import InputError
from moe_jax.interop.tensor_files import SAFETENSORS, TORCH

# Files besides weights: configs, tokenizer, chat template.
SMALL = ('*.json', '*.jinja', '*.model', '*.txt')
_REPOSITORY = re.compile(r'[\w.-]+(/[\w.-]+)?')


def fetch(
  source: str | os.PathLike[str], *, weights: bool = True, revision: str = ''
) -> pathlib.Path:
  """The folder of `source`, downloaded to the hub's cache if it is no folder.

  If a repository has safetensors, PyTorch's files are not fetched. Without a
  network, files are taken from the cache.

  Args:
    source: A folder, or the id of a repository: 'google/switch-base-8'.
    weights: Whether weights are fetched, besides configs and tokenizer.
    revision: A branch, tag or commit; '' is the main branch.

  Raises:
    ValueError: The source is neither a folder nor a repository.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  name = str(source)
  if folder.exists() or not _REPOSITORY.fullmatch(name):
    raise InputError(f'{name} is no folder, and no id of a hub repository')
  if not weights:
    return _download(name, revision, [])
  for file in (SAFETENSORS, TORCH):
    stem, _, ending = file.partition('.')
    patterns = [file, f'{stem}-*.{ending}']  # one file, or shards
    folder = _download(name, revision, patterns)
    if any(path for pattern in patterns for path in folder.glob(pattern)):
      break
  return folder


def small_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a checkpoint besides weights and their index.

  Raises:
    ValueError: One of them is a link out of the folder, or no plain file.
  """
  files = plain_files.matching(folder, SMALL)
  return [path for path in files if not path.name.endswith('.index.json')]


def _download(name: str, revision: str, patterns: list[str]) -> pathlib.Path:
  try:
    folder = huggingface_hub.snapshot_download(
      name, revision=revision or None, allow_patterns=[*SMALL, *patterns]
    )
  except Exception as error:  # of the client, of HTTP or of the network
    first_line = str(error).strip().split('\n', 1)[0]
    raise InputError(
      f'{name} is no folder in {os.getcwd()}, and the hub does not give it: '
      f'{first_line}'
    ) from error
  return pathlib.Path(folder)
