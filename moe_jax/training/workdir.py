"""A run's folder: whose it is, and what is in it by name.

Not here: what the files hold (`checkpoint.py`, `metrics.py`).
"""

import json
import os
import pathlib

import ml_collections

from moe_jax import config as config_lib

CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
TOKENIZER = 'tokenizer.json'


def claim(
  workdir: str | os.PathLike[str],
  config: ml_collections.ConfigDict,
  *,
  resume: bool = False,
) -> pathlib.Path:
  """Makes the folder the config's own, or checks that it is.

  Args:
    workdir: A local folder; it is made if need be.
    config: What the run is.
    resume: Goes on in a folder of another config, which is then replaced; the
      one before is kept as `config.0.json`, `config.1.json`, ...

  Raises:
    ValueError: The folder holds another run's config; the differences are
      listed, old before new.
    OSError: The folder cannot be made or written.
  """
  folder = pathlib.Path(workdir).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / CONFIG
  # Through JSON, so that tuples compare equal to what was written.
  new = json.loads(config.to_json_best_effort())
  if path.exists():
    old = json.loads(path.read_text(encoding='utf-8'))
    changes = config_lib.difference(old, new)
    if not changes:
      return folder
    if not resume:
      listed = [f'  {key}: {a!r} -> {b!r}' for key, (a, b) in changes.items()]
      raise ValueError(
        f'{folder} holds another run; its config differs:\n'
        + '\n'.join(listed)
        + '\nchoose another --workdir, or go on in it with --resume'
      )
    number = 0
    while (aside := folder / f'config.{number}.json').exists():
      number += 1
    path.rename(aside)
  write_text(path, json.dumps(new, indent=2, sort_keys=True) + '\n')
  return folder


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a whole file or none of it."""
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_text(text, encoding='utf-8')
  unfinished.replace(path)
