"""Runs that are compared, in groups of one config.

Runs whose configs differ in nothing but their seed are a group, with a letter;
the group of the first run is the one that others are compared to. Not here:
tables and curves of groups (`compared_tables.py`).
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import sections
from moe_jax.analysis import run_sections
from moe_jax.analysis.run_sections import RunFolder
from moe_jax.errors import InputError
from moe_jax.runs import metrics, workdir

# The folders of a study's runs are named after the seed; see `jobs.jobs_of`.
_OF_SEED = re.compile(r'seed\d+-[0-9a-f]{10}')
SPEED = 'train/tokens_per_second'
_TRAINING = ('train/loss', 'train/drop_rate', SPEED)
Groups = Mapping[str, Sequence['Compared']]


@dataclasses.dataclass(frozen=True)
class Compared:
  """A run that is compared.

  Attributes:
    run: The values that are read from its folder.
    seed: Its seed.
    last: The last value of each metric that is compared, the median of speeds.
  """

  run: RunFolder
  seed: int
  last: Mapping[str, float]


def read(folders: Sequence[pathlib.Path]) -> Groups:
  """Reads runs and puts them into groups.

  Two runs of one config and seed are in two groups, so that each seed of a
  group has one run.

  Args:
    folders: Folders of the runs.

  Returns:
    The runs of each group, by its letter.

  Raises:
    ValueError: A folder is given twice, holds no run or has no metrics; or
      losses of the runs are of other tokens or in other units.
  """
  repeated = {str(f) for f in folders if folders.count(f) > 1}
  if repeated:
    raise InputError(f'runs are given twice: {sorted(repeated)}')
  runs = [run_sections.read(folder) for folder in folders]
  for run in runs:
    if not run.rows:
      raise InputError(
        f'{run.folder} has no metrics: {metrics.FILE_NAME} has no row, so it '
        'has not been trained yet'
      )
  _check_losses(runs)
  groups: dict[tuple[str, int], list[Compared]] = {}
  repeats: dict[tuple[str, int], int] = {}
  for run in runs:
    config, seed = _config_text(run), run.config.get('seed', 0)
    repeats[config, seed] = repeats.get((config, seed), -1) + 1
    key = config, repeats[config, seed]
    groups.setdefault(key, []).append(Compared(run, seed, _last(run.rows)))
  return {_letter(i): group for i, group in enumerate(groups.values())}


def _letter(number: int) -> str:
  """The letter of a group: 'A' to 'Z', then 'A1' and so on."""
  round_, index = divmod(number, 26)
  return chr(ord('A') + index) + (str(round_) if round_ else '')


def _check_losses(runs: Sequence[RunFolder]) -> None:
  """Raises ValueError where losses of two runs are of different things."""
  readers = {'tokenizers': _tokenizer, 'units of losses': _unit}
  for run in runs[1:]:
    for noun, read_of in readers.items():
      first, other = read_of(runs[0]), read_of(run)
      if first != other:
        raise InputError(
          f'runs with different {noun} cannot be compared: {runs[0].folder} '
          f'has {first:.60}, and {run.folder} has {other:.60}'
        )


def _unit(run: RunFolder) -> str:
  return run.facts.loss_unit


def _tokenizer(run: RunFolder) -> str:
  path = run.folder / workdir.TOKENIZER
  return path.read_text(encoding='utf-8').strip() if path.exists() else 'none'


def config_of(run: RunFolder) -> dict[str, str]:
  """The config of a run without its seed, as texts by dotted name.

  The folder of a study's run that it begins with or learns from is given
  without the seed, too, and with a digest of that run's own config, as starts
  of one name may have other lengths.
  """
  return _texts(run.config)


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
  values = sections.flatten(config)
  values.pop('seed', None)
  return {key: _text(value) for key, value in values.items()}


def _text(value: Any) -> str:
  text, num_seeds = _OF_SEED.subn('seed*', str(value))
  folder = pathlib.Path(str(value))
  if num_seeds and (folder / workdir.CONFIG).exists():
    config = _texts(workdir.kept_config(folder))
    content = json.dumps(config, sort_keys=True).encode()
    text += f', config {hashlib.sha256(content).hexdigest()[:10]}'
  return text


def _config_text(run: RunFolder) -> str:
  return json.dumps(config_of(run), sort_keys=True)


def _last(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  last: dict[str, float] = {}
  for row in rows:
    for key, value in row.items():
      of_eval = re.fullmatch(r'eval/[^/]+/[^/]+', key)
      if (key in _TRAINING or of_eval) and isinstance(value, int | float):
        last[key] = value
  if SPEED in last:
    speeds = [row[SPEED] for row in rows if SPEED in row]
    last[SPEED] = float(np.median(speeds))
  return last
