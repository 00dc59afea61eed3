"""The runs of a study: a config and a folder for every arm and seed.

A start, a run that others begin with or learn from, is trained once for each
seed, or made of another start. It keeps its last checkpoint in the folder
`starts` beside the studies' own, so that studies with equal starts share them.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.study.parts import Arm, Change, Result, Start
from moe_jax import config as config_lib
from moe_jax.config import Options, keys_of, merge, read_options, unknown
from moe_jax.errors import InputError
from moe_jax.runs.workdir import write_text

RESULT = 'result.json'
FOLDER = 'starts'
_CHANGED = 'run'


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of a study.

  Attributes:
    arm: The arm that the run belongs to.
    seed: Seed of the parameters, of the order of the data and of all noise.
    config: The whole config of the run.
    workdir: Folder of the run, named after the arm, the seed and the config's
      hash.
    keeps: Whether the last checkpoint stays when the run has its result.
  """

  arm: Arm
  seed: int
  config: ConfigDict
  workdir: pathlib.Path
  keeps: bool = False

  @property
  def name(self) -> str:
    """Name of the run in printed lines."""
    return f'{self.arm.name}, seed {self.seed}'

  @property
  def folder(self) -> pathlib.Path:
    """The folder of the run as other runs begin with it.

    A run that is made of another one has a folder below `workdir`, whose log
    and result it would otherwise find there.
    """
    return self.workdir if self.arm.change is None else self.workdir / _CHANGED

  @property
  def begins_with(self) -> pathlib.Path:
    """The folder of the run that this one begins with; it has a start."""
    return pathlib.Path(self.config.init_from.workdir)

  @property
  def is_finished(self) -> bool:
    """Whether the run has a result."""
    return (self.workdir / RESULT).exists()

  def result(self) -> Result:
    """The result of the run, which must be finished."""
    return json.loads((self.workdir / RESULT).read_text(encoding='utf-8'))

  def write_result(self, result: Result) -> None:
    """Writes the result of the run, which is finished from then on."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    write_text(self.workdir / RESULT, json.dumps(result, indent=2) + '\n')


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Turns dotted names into nested dicts, as `config.merge` takes them.

  `{'model.width': 64}` becomes `{'model': {'width': 64}}`.

  Raises:
    ValueError: A key has a value and is also the section of another key.
  """
  tree: dict[str, Any] = {}
  for key, value in flat.items():
    *sections, name = key.split('.')
    section = tree
    for part in sections:
      section = section.setdefault(part, {})
      if not isinstance(section, dict):
        raise InputError(f'{key} is within {part}, which has a value')
    if name in section:
      raise InputError(f'{key} has a value and keys of its own')
    section[name] = value
  return tree


def layered(
  cls: type[Options], config: ConfigDict, overrides: Mapping[str, Any]
) -> ConfigDict:
  """A locked copy of a config with one more layer of overrides.

  Args:
    cls: Class of the options that the config describes.
    config: The config.
    overrides: Values by dotted name. They may choose another kind for a
      section; settings of the kind chosen before then return to their
      defaults.

  Raises:
    ValueError: A key does not exist, or a value has another type.
  """
  return config_lib.layered(cls, config, nested(overrides))


def jobs_of(
  cls: type[Options],
  shared: ConfigDict,
  arms: Sequence[Arm],
  seeds: Sequence[int],
  output: pathlib.Path,
  started: Mapping[tuple[str, int], Job] = types.MappingProxyType({}),
) -> list[Job]:
  """A job for every arm and seed; the seeds are the outer loop.

  Args:
    cls: Class of the options that configs describe.
    shared: The config that the arms change.
    arms: The arms.
    seeds: The seeds.
    output: Folder of the study.
    started: Runs that arms begin with or learn from, by name and seed.

  Raises:
    ValueError: Two arms have one name, or an arm's overrides do not fit.
  """
  names = [arm.name for arm in arms]
  for name in names:
    if names.count(name) > 1:
      raise InputError(f'two arms are named {name!r}')
  # Other options of these sections that an arm has need a run's folder.
  configs = [
    layered(
      cls, shared, {**arm.overrides, **dict.fromkeys(arm.runs_before, 'a run')}
    )
    for arm in arms
  ]
  for config in configs:
    read_options(cls, config)
  jobs = []
  for seed in seeds:
    for arm, config in zip(arms, configs, strict=True):
      hashed, changes = {'seed': seed}, {'seed': seed}
      for key, name in arm.runs_before.items():
        start = started[name, seed]
        # Names, not the path, are hashed: results may be moved.
        workdir = start.workdir
        hashed[key] = f'{workdir.parent.name}/{workdir.name}'
        changes[key] = str(start.folder)
      digest = config_hash(merge(config, nested(hashed)), text_of(arm.change))
      config = merge(config, nested(changes))
      short = re.sub(r'[^A-Za-z0-9.]+', '_', arm.name).strip('_')
      folder = f'seed{seed}-{digest}'
      jobs.append(Job(arm, seed, config, output / 'runs' / short / folder))
  return jobs


def in_order(starts: Sequence[Start], arms: Sequence[Arm]) -> list[list[Start]]:
  """The starts that arms need, in lists that need only earlier lists.

  Raises:
    ValueError: There is no start of a name, or starts begin with each other.
  """
  by_name = {start.name: start for start in starts}
  levels: dict[str, int] = {}

  def level(name: str, above: tuple[str, ...] = ()) -> int:
    """The number of starts that come before one; notes it for all of them."""
    if name not in by_name:
      raise unknown('start', name, by_name)
    if name in above:
      raise InputError(f'starts begin with each other: {[*above, name]}')
    before = by_name[name].arm.runs_before.values()
    numbers = [level(other, (*above, name)) for other in before]
    levels[name] = 1 + max(numbers, default=-1)
    return levels[name]

  for arm in arms:
    for name in arm.runs_before.values():
      level(name)
  return [
    [by_name[name] for name, depth in levels.items() if depth == number]
    for number in range(max(levels.values(), default=-1) + 1)
  ]


def settings_digest(cls: type[Options], job: Job) -> str:
  """A short hash of what a run's arm and config state, without its seed.

  It is of the values that are not an option's default, so that an option which
  is added later changes no digest. A run's folder has another hash, of all
  values (`config_hash`), since a run must never be taken for another.

  Args:
    cls: Class of the options that the config describes.
    job: The run.
  """
  arm = job.arm
  stated = {
    key.path: key.value
    for key in keys_of(cls, job.config)
    if key.changed or key.path.endswith('.kind')
  }
  for key in ('seed', *arm.runs_before):  # paths, which say where results are
    stated.pop(key, None)
  origin = [arm.start, arm.teacher, text_of(arm.change)]
  text = json.dumps([origin, stated], sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:10]


def text_of(change: Change | None) -> str:
  """The name of a function that changes runs, with arguments; '' for None."""
  if change is None:
    return ''
  if isinstance(change, functools.partial):
    keywords = sorted(change.keywords.items())
    return f'{text_of(change.func)}{change.args}{keywords}'
  # The name of a study's module is another where `python -m` runs it.
  spec = sys.modules[change.__module__].__spec__
  module = spec.name if spec else change.__module__
  return f'{module}.{change.__qualname__}'


def config_hash(config: ConfigDict, change: str = '') -> str:
  """A short hash of a config, which does not depend on the order of keys.

  Args:
    config: The config.
    change: Text of the function that makes the run from another one.
  """
  text = json.dumps(config.to_dict(), sort_keys=True, default=list) + change
  return hashlib.sha256(text.encode()).hexdigest()[:10]
