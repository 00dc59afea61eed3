"""The folder of a run that began as a checkpoint of Hugging Face.

It has a checkpoint of step 0 with only parameters, the run's config, the
tokenizer, and in `huggingface/` the files that came with the weights.
`config.py`, a config file for `moe_jax.main`, is always the same text, which
reads the values in `imported.json`. Not here: what an import reads
(`import_run.py`).
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from moe_jax import sections
from moe_jax.data import plain_files, tokenizers
from moe_jax.data.cache_folders import locked
from moe_jax.interop.checkpoint_folder import Checkpoint
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.training.run_options import RunOptions

FILES = workdir_lib.IMPORTED
CONFIG_PY, VALUES = 'config.py', 'imported.json'
_UNFINISHED = '.importing'
# The parts of an imported folder, in the order in which they appear there.
_PARTS = (
  FILES,
  workdir_lib.TOKENIZER,
  workdir_lib.CHECKPOINTS,
  VALUES,
  CONFIG_PY,
  workdir_lib.CONFIG,
)
_CONFIG_PY = '''"""A run that began as a checkpoint of Hugging Face.

    python -m moe_jax.main --config=FOLDER/config.py --workdir=FOLDER
"""

import pathlib

from moe_jax import run_config


def get_config():
  return run_config.from_file(pathlib.Path(__file__).with_name('imported.json'))
'''


def check_free(folder: pathlib.Path) -> None:
  """Raises ValueError for a folder that is neither new nor empty.

  What an import that was killed has left there does not count.
  """
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'{folder} is a file; it must be a folder')
  names = {path.name for path in folder.iterdir()} if folder.exists() else set()
  run = [n for n in (workdir_lib.CONFIG, workdir_lib.CHECKPOINTS) if n in names]
  if _UNFINISHED in names and workdir_lib.CONFIG not in names:
    names -= {_UNFINISHED, *_PARTS}
    run = []
  if run:
    raise ValueError(f'{folder} holds a run already ({run[0]}); choose another')
  names = {name for name in names if not name.endswith('.lock')}
  if names:
    raise ValueError(
      f'{folder} is not empty, it has {min(names)!r}; give a new or empty one'
    )


@contextlib.contextmanager
def building(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder in which a run is built; then its parts move to `folder`.

  The config moves last, so that an import that was killed is no run, and is
  simply started again.
  """
  new = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  unfinished = folder / _UNFINISHED
  try:
    with locked(unfinished):
      check_free(folder)
      for name in (_UNFINISHED, *_PARTS):
        _remove(folder / name)
      unfinished.mkdir()
      yield unfinished
      for name in _PARTS:
        if (unfinished / name).exists():
          (unfinished / name).rename(folder / name)
      unfinished.rmdir()
  except BaseException:
    _remove(unfinished)
    if new:
      with contextlib.suppress(OSError):
        folder.rmdir()
    raise


def _remove(path: pathlib.Path) -> None:
  """Removes a file or a folder, if it is there."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def copy_files(files: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
  """Copies the small files of a checkpoint into a new folder."""
  folder.mkdir(parents=True)
  for path in files:
    plain_files.copy(path, folder / path.name)


def write(
  folder: pathlib.Path,
  checkpoint: Checkpoint,
  options: RunOptions,
  tokenizer: tokenizers.Json | None,
  params: Any,
) -> None:
  """Writes a run's folder, of which the files of the checkpoint are there."""
  if tokenizer is not None:
    tokenizer.save(folder / workdir_lib.TOKENIZER)
  with Checkpointer(folder / workdir_lib.CHECKPOINTS, keep_best=False) as kept:
    extra = {'imported': checkpoint.architecture.model_type}
    kept.save(0, {'params': params}, extra=extra)
  config = sections.section(options)
  text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
  (folder / VALUES).write_text(text + '\n', encoding='utf-8')
  (folder / CONFIG_PY).write_text(_CONFIG_PY, encoding='utf-8')
  workdir_lib.claim(folder, config)
