"""Every config as text, so that a change of one shows as a diff in review.

python -m tests.golden    # writes them anew
"""

import importlib
import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(__file__).parent
NAMES = sorted(
  path.stem
  for path in (ROOT / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'base')
)


def config(name: str, arg: str = ''):
  """The config of configs/<name>.py."""
  return importlib.import_module(f'configs.{name}').get_config(arg)


def dump(name: str) -> str:
  """The config's JSON, sorted."""
  tree = json.loads(config(name).to_json_best_effort())
  return json.dumps(tree, indent=1, sort_keys=True) + '\n'
