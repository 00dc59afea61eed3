"""The runs of a study: a config and a folder for every arm and seed.

Not here: how a run is made (`runner.py`), and when it begins (`scheduler.py`).
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from experiments.study.parts import Arm, Result
from experiments.study.sweeps import nested
from moe_jax import sections
from moe_jax.options import Options
from moe_jax.runs.workdir import write_text

RESULT = 'result.json'
_BEGINS_WITH = 'init_from.workdir'


@dataclasses.dataclass(frozen=True)
class Item:
  """One run of `python -m moe_jax.main`, as `experiments.launch` starts it.

  Attributes:
    config: Config file, with its argument if it has one: 'configs/name.py' or
      'configs/name.py:runlocal'.
    overrides: Values of config keys by dotted name,
      `{'model.moe.num_experts': 4}`.
    workdir: Folder of this run, shared with no other.
  """

  config: str
  overrides: Mapping[str, Any]
  workdir: str

  def flags(self) -> list[str]:
    """The overrides as arguments of `moe_jax.main`."""
    return [f'--config.{key}={value}' for key, value in self.overrides.items()]


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
  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  keeps: bool = False

  @property
  def name(self) -> str:
    """Name of the run in printed lines."""
    return f'{self.arm.name}, seed {self.seed}'

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


def layered(
  cls: type[Options],
  config: ml_collections.ConfigDict,
  overrides: Mapping[str, Any],
) -> ml_collections.ConfigDict:
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
  changed = sections.merge(config, nested(overrides))
  return sections.settle(cls, config, changed)[0]


def jobs_of(
  cls: type[Options],
  shared: ml_collections.ConfigDict,
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
    started: Runs whose parameters the arms begin with, by name and seed.

  Raises:
    ValueError: Two arms have one name, or an arm's overrides do not fit.
  """
  names = [arm.name for arm in arms]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'two arms are named {name!r}')
  # Other options of `init_from` that an arm has need a run to begin with.
  begins = [{_BEGINS_WITH: 'a run'} if arm.start else {} for arm in arms]
  configs = [
    layered(cls, shared, {**arm.overrides, **begin})
    for arm, begin in zip(arms, begins, strict=True)
  ]
  for config in configs:
    sections.read(cls, config)
  jobs = []
  for seed in seeds:
    for arm, config in zip(arms, configs, strict=True):
      named, changes = {'seed': seed}, {'seed': seed}
      if arm.start:
        start = started[arm.start, seed].workdir
        # Names, not the path, are hashed: results may be moved.
        named[_BEGINS_WITH] = f'{start.parent.name}/{start.name}'
        changes[_BEGINS_WITH] = str(start)
      hashed = config_hash(sections.merge(config, nested(named)))
      config = sections.merge(config, nested(changes))
      short = re.sub(r'[^A-Za-z0-9.]+', '_', arm.name).strip('_')
      folder = f'seed{seed}-{hashed}'
      jobs.append(Job(arm, seed, config, output / 'runs' / short / folder))
  return jobs


def config_hash(config: ml_collections.ConfigDict) -> str:
  """A short hash of a config, which does not depend on the order of keys."""
  text = json.dumps(config.to_dict(), sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:10]
