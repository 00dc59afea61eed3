"""A study: arms that differ in a few config keys, on paired seeds.

Every seed gives all arms the same initial shared weights' key and the same
data order. Not here: what a study asks (one file a question).
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from scipy import stats

from experiments.launch import Item
from moe_jax import evaluation
from moe_jax.config import flatten, merge
from moe_jax.hooks import Facts
from moe_jax.training import metrics
from moe_jax.training import workdir as workdir_lib
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.setup import Hook, Run

RESULT = 'result.json'


@dataclasses.dataclass(frozen=True)
class Arm:
  """One kind of run: a name and what it changes in the study's config."""

  name: str
  overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over seeds with the half width of its 95 % confidence interval.

  The interval is Student's; of one seed it is infinite.
  """

  mean: float
  half_width: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Interval':
    """Of one value a seed."""
    n = len(values)
    if n < 2:
      return cls(float(np.mean(values)), float('inf'))
    error = np.std(values, ddof=1) / np.sqrt(n)
    return cls(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * error))

  def verdict(self) -> str:
    """Of a paired difference in loss: what the interval can tell."""
    if abs(self.mean) <= self.half_width:
      return 'not resolved'
    return 'better' if self.mean < 0 else 'worse'

  def __format__(self, spec: str) -> str:
    """'1.3580 ± 0.0040', both in `spec`."""
    width = f'{self.half_width:{spec.lstrip("+")}}'
    if np.isinf(self.half_width):
      width = 'unknown'
    return f'{self.mean:{spec}} ± {width}'


class _Digest(Hook):
  """Remembers what a run was trained on."""

  def start(self, run: Run) -> None:
    self.data_digest = run.dataset.digest


def run_study(
  config: ml_collections.ConfigDict,
  arms: Sequence[Arm],
  seeds: Sequence[int],
  output: pathlib.Path,
) -> dict[str, list[dict[str, Any]]]:
  """Trains every arm on every seed; the rows of each run's last step, by arm.

  Seeds are the outer loop, so that the arms' timings interleave. A run that
  is finished is read, one that was interrupted goes on.

  Raises:
    ValueError: Two runs saw different data, or a folder holds another study.
  """
  # Runs that differ in the seed alone share one compiled program.
  cache = pathlib.Path(tempfile.mkdtemp(prefix='moe_jax_xla_'))
  jax.config.update('jax_compilation_cache_dir', str(cache))
  results = {arm.name: [] for arm in arms}
  for seed in seeds:
    for arm in arms:
      run_config = merge(config, {'seed': seed, **arm.overrides})
      workdir = _folder(output, arm, seed)
      print(f'\n== {arm.name}, seed {seed} ==', flush=True)
      results[arm.name].append(run_one(run_config, workdir))
  digests = {r['data_digest'] for rows in results.values() for r in rows}
  if len(digests) > 1:
    raise ValueError(f'runs saw different data: sha256 {sorted(digests)}')
  return results


def study_items(
  config: str, arms: Sequence[Arm], seeds: Sequence[int], output: pathlib.Path
) -> list[Item]:
  """The runs of `run_study` for `experiments.launch`, in its folders.

  Args:
    config: The study's, as a config file: 'experiments/name.py:argument'.
    arms: Of the study.
    seeds: Of the study.
    output: Of the study.
  """
  return [
    Item(
      config,
      {'seed': seed, **flatten(arm.overrides)},
      str(_folder(output, arm, seed)),
    )
    for seed in seeds
    for arm in arms
  ]


def _folder(output: pathlib.Path, arm: Arm, seed: int) -> pathlib.Path:
  return output / 'runs' / arm.name / f'seed{seed}'


def run_one(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any]:
  """One run's result: its last row of each key, and its median step time."""
  workdir_lib.check(workdir, config)
  path = workdir / RESULT
  if not path.exists():
    digest = _Digest()
    state = train_and_evaluate(
      config, workdir, hooks=[Facts(), digest], kinds=evaluation.KINDS
    )
    if int(state.step) < config.total_steps:
      raise SystemExit(f'{workdir} was stopped; run the study again to go on')
    rows = metrics.read_metrics(workdir / metrics.FILE_NAME)
    last = {}
    for row in rows:
      last |= row
    times = [r['train/step_seconds'] for r in rows if 'train/step_seconds' in r]
    result = {
      **last,
      'data_digest': digest.data_digest,
      'median_step_seconds': float(np.median(times)),
    }
    workdir_lib.write_text(path, json.dumps(result, indent=2) + '\n')
  return json.loads(path.read_text(encoding='utf-8'))


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
  """GitHub's Markdown, the first row's keys as headings."""
  headings = list(rows[0])
  lines = [headings, ['---'] * len(headings)]
  lines += [[row[h] for h in headings] for row in rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'
