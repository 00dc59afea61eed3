"""A checkpoint's folder: the user's own, or one fetched from a hub."""

import os
import pathlib
import re

import huggingface_hub

from moe_jax.interop.tensor_files import SAFETENSORS, TORCH

# What a checkpoint has beside its weights: configs, tokenizer, chat template.
SMALL = ('*.json', '*.jinja', '*.model', '*.txt')
_REPOSITORY = re.compile(r'[\w.-]+(/[\w.-]+)?')


def fetch(
  source: str | os.PathLike[str], *, weights: bool = True, revision: str = ''
) -> pathlib.Path:
  """The folder of `source`, downloaded to the hub's cache if it is no folder.

  Where a repository has both, safetensors are fetched and PyTorch's files not.
  Without a network, what the cache has will do.

  Args:
    source: A folder, or the id of a repository: 'google/switch-base-8'.
    weights: Whether weights are fetched, beside configs and tokenizer.
    revision: A branch, tag or commit; '' is the main branch.

  Raises:
    ValueError: There is no such folder, and no such repository either.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  name = str(source)
  if folder.exists() or not _REPOSITORY.fullmatch(name):
    raise ValueError(f'{name} is no folder, and no id of a hub repository')
  if not weights:
    return _download(name, revision, [])
  for file in (SAFETENSORS, TORCH):
    stem, _, ending = file.partition('.')
    patterns = [file, f'{stem}-*.{ending}']  # whole, or in shards
    folder = _download(name, revision, patterns)
    if any(path for pattern in patterns for path in folder.glob(pattern)):
      break
  return folder


def _download(name: str, revision: str, patterns: list[str]) -> pathlib.Path:
  try:
    folder = huggingface_hub.snapshot_download(
      name, revision=revision or None, allow_patterns=[*SMALL, *patterns]
    )
  except Exception as error:  # the client's own, HTTP's, the network's
    first = str(error).strip().split('\n', 1)[0]
    raise ValueError(
      f'{name} is no folder in {os.getcwd()}, and the hub does not give it: '
      f'{first}'
    ) from error
  return pathlib.Path(folder)
