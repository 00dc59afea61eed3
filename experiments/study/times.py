"""What the steps of a study's arms take, interleaved, after its runs.

Not here: the runs (`scheduled_runs.py`).
"""

import hashlib
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from experiments.benchmarks import timing
from experiments.study.scheduled_runs import Job, config_hash
from moe_jax import evaluation
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.setup import set_up

_STEPS = 5
_SECONDS = 30.0


def step_times(
  study: Any, jobs: Sequence[Job], output: pathlib.Path
) -> dict[str, timing.Spread]:
  """The time of each timed arm's step over that of the first of `study.timed`.

  Steps are interleaved in one process that has all cores; quartiles of the
  ratios within a round. What this device was measured at once is read.
  """
  configs = {job.arm.name: job.config for job in jobs if not job.seed}
  timed = {name: configs[name] for name in study.timed if name in configs}
  if not timed:
    return {}
  hashes = [config_hash(config) for config in timed.values()]
  key = ' '.join([timing.device_name(), jax.__version__, *hashes])
  name = hashlib.sha256(key.encode()).hexdigest()[:10]
  path = output / f'step_times-{name}.json'
  if not path.exists():
    print(f'timing the steps of {len(timed)} arms', flush=True)
    cases = {name: _Stepping(config) for name, config in timed.items()}
    found = timing.interleave(cases, seconds=_SECONDS)
    first = found[study.timed[0]]
    spreads = {name: timing.ratio(s, first) for name, s in found.items()}
    written = {n: [s.low, s.median, s.high] for n, s in spreads.items()}
    output.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_text(path, json.dumps(written, indent=2) + '\n')
  found = json.loads(path.read_text(encoding='utf-8'))
  return {name: timing.Spread(*values) for name, values in found.items()}


class _Stepping:
  """A few steps of a run, from where the last few ended."""

  def __init__(self, config: ml_collections.ConfigDict):
    with tempfile.TemporaryDirectory() as folder:
      self._run = set_up(config, folder, kinds=evaluation.KINDS)
    self._state = self._run.programs.init_state()
    self._batches = self._run.batches(0)

  def __call__(self) -> None:
    """Takes them and waits."""
    for _ in range(_STEPS):
      self._state, _ = self._run.train_step(self._state, next(self._batches))
    jax.block_until_ready(self._state)
