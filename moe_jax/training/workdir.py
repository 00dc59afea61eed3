"""A run's folder: whose it is, and what is in it by name.

Not here: what the files hold (`checkpoint.py`, `metrics.py`).
"""

import json
import os
import pathlib
from typing import Any

import ml_collections

from moe_jax import config as config_lib

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
    workdir: A local folder, which need not exist.
    config: What the run is.
    resume: Whether the folder of another config will do.

  Raises:
    ValueError: The folder is a file, its config cannot be read, or it is
      another run's: then the differences are listed, old before new.
  """
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
  return folder


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
