"""Every config as text, so that a change of one shows as a diff in review.

A file holds the keys whose values are not the defaults; null stands for an
evaluation that the defaults have and the config does not have.

    python -m tests.golden    # writes all files again
"""

import importlib
import json
import pathlib

from moe_jax.config import keys_of, section_of
from moe_jax.run_config import RunConfig

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(__file__).parent
NAMES = sorted(
  path.stem
  for path in (ROOT / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'base')
)


def config(name: str, arg: str = ''):
  """The config of configs/<name>.py."""
  return importlib.import_module(f'moe_jax.configs.{name}').get_config(arg)


def dump(name: str) -> str:
  """JSON of the values that the config changes, by dotted name."""
  named_config, default = config(name), section_of(RunConfig)
  defaults = {leaf.path: leaf for leaf in keys_of(RunConfig, default)}
  removed = set(default.evals) - set(named_config.evals)
  changed = {f'evals.{entry}': None for entry in removed}
  for leaf in keys_of(RunConfig, named_config):
    before = defaults.get(leaf.path)
    if before is None:  # an evaluation that the defaults lack
      is_changed = leaf.changed or leaf.path.endswith('.kind')
    else:
      is_changed = before.value != leaf.value
    if is_changed:
      changed[leaf.path] = leaf.value
  return json.dumps(changed, indent=1, sort_keys=True, default=list) + '\n'
