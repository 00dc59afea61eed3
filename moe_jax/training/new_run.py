"""The folder of a run that begins with given variables.

It has a checkpoint of step 0 with only parameters (and a balancing bias where
the model keeps one), the run's config, the tokenizer, and in `huggingface/` the
files that came with weights that were imported. `config.py`, a config file for
`moe_jax.main`, is always the same text, which reads the values in
`first_config.json`. Imports write such folders, and so does every command that
makes a new model from a run.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from moe_jax.config import Section, plain, section_of
from moe_jax.data import tokenizers
from moe_jax.data.cache_folders import whole_folder
from moe_jax.models.trees import variables as as_variables
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer

CONFIG_PY, VALUES = 'config.py', 'first_config.json'
_CONFIG_PY = '''"""A run that began with the parameters of another model.

    python -m moe_jax.main --config=FOLDER/config.py --workdir=FOLDER
"""

import pathlib

from moe_jax import run_config


def get_config():
  folder = pathlib.Path(__file__).parent
  return run_config.from_file(folder / 'first_config.json')
'''


def write(
  folder: pathlib.Path,
  config: Section,
  variables: Mapping[str, Any],
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes a run's config and checkpoint beside its tokenizer and files.

  Args:
    folder: The folder, which a caller renames once it is whole.
    config: The config of the run.
    variables: 'params' of the run's model, and 'router_state' if it has one.
    extra: The JSON values to save with the checkpoint; see `Checkpointer.save`.
  """
  with Checkpointer(folder / workdir_lib.CHECKPOINTS, keep_best=False) as saver:
    saver.save(0, dict(variables), extra=extra)
  write_config(folder, config)


def write_config(folder: pathlib.Path, config: Section) -> None:
  """Writes a run's config, and `config.py`, which reads the config's values."""
  text = json.dumps(plain(config), indent=2, sort_keys=True)
  (folder / VALUES).write_text(text + '\n', encoding='utf-8')
  (folder / CONFIG_PY).write_text(_CONFIG_PY, encoding='utf-8')
  workdir_lib.claim(folder, config)


def derive(
  base: str | os.PathLike[str],
  output: str | os.PathLike[str],
  params: Any,
  changes: Mapping[str, Any] | None = None,
  *,
  router_state: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Makes a run's folder from another run's, with parameters of its own.

  The new config is that of the base, without the sections `lora`, `init_from`
  and `distill`. Tokenizer and imported files are copied; where the base took
  its tokenizer from the run of `init_from`, the new config names the copy.

  Args:
    base: Folder of a run.
    output: A folder that is new or empty.
    params: The parameters of the new model.
    changes: Sections of the config that replace those of the base, by name.
    router_state: The state of the model's routers; None or empty where they
      keep none.

  Returns:
    The new folder, whole.

  Raises:
    ValueError: `output` is not free.
  """
  base = pathlib.Path(base).expanduser().resolve()
  output = pathlib.Path(output).expanduser().resolve()
  config = workdir_lib.kept_config(base) | dict(changes or {})
  config = _with_kept_tokenizer(config, base, output)
  for section in ('lora', 'init_from', 'distill'):
    config.pop(section, None)
  config.get('checkpoint', {}).pop('directory', None)
  for name in (workdir_lib.IMPORTED, workdir_lib.TOKENIZER):
    config = _with_folder(config, str(base / name), str(output / name))
  with whole_folder(output) as unfinished:
    for name in (workdir_lib.TOKENIZER, workdir_lib.PLUGINS):
      if (base / name).exists():
        shutil.copyfile(base / name, unfinished / name)
    if (imported := base / workdir_lib.IMPORTED).is_dir():
      shutil.copytree(imported, unfinished / imported.name)
    write(unfinished, config, as_variables(params, router_state))
  return output


def _with_kept_tokenizer(
  config: dict[str, Any], base: pathlib.Path, output: pathlib.Path
) -> dict[str, Any]:
  """The config of the base run, with the tokenizer that the run really used.

  A run that began from another run (`init_from`) used that run's tokenizer, not
  its own `data.tokenizer`. The new run has no `init_from`, so its config names
  the file of that tokenizer in `output`.
  """
  init_from, path = config.get('init_from', {}), base / workdir_lib.TOKENIZER
  is_kept = init_from.get('workdir') and init_from.get('keep_tokenizer', True)
  if not is_kept or not path.exists():
    return config
  kept = tokenizers.FileOptions(str(output / workdir_lib.TOKENIZER))
  section = section_of(kept, tokenizers.TOKENIZERS).to_dict()
  return config | {'data': {**config.get('data', {}), 'tokenizer': section}}


def _with_folder(values: Any, old: str, new: str) -> Any:
  """The values of a config in which one name of a folder replaces another."""
  if isinstance(values, Mapping):
    return {key: _with_folder(value, old, new) for key, value in values.items()}
  return new if values == old else values
