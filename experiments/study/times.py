"""Times the steps of a study's arms, interleaved, after its runs.

Not here: the runs (`scheduled_runs.py`).
"""

import hashlib
import json
import pathlib
import tempfile
from collections.abc import Sequence

import jax
import ml_collections

from experiments.benchmarks import timing
from experiments.study.jobs import Job
from experiments.study.study import Study
from moe_jax import run_config
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.setup import set_up

_STEPS = 5
_SECONDS = 30.0


def step_times(
  study: Study, jobs: Sequence[Job], output: pathlib.Path
) -> dict[str, timing.Spread]:
  """Quartiles of each timed arm's step time over that of the first timed arm.

  Steps are interleaved in one process that has all cores, and ratios are taken
  within rounds. They are measured once for a device and read from a file later.

  Args:
    study: The study; `study.timed` names the arms.
    jobs: Runs of the study, which have the configs of its arms.
    output: Folder of the study.
  """
  first = {job.arm.name: job for job in jobs if not job.seed}
  timed = {name: first[name] for name in study.timed if name in first}
  if not timed:
    return {}
  # Names of the runs' folders, which end in the hash of a config.
  hashes = [job.workdir.name for job in timed.values()]
  key = ' '.join([timing.device_name(), jax.__version__, *hashes])
  name = hashlib.sha256(key.encode()).hexdigest()[:10]
  path = output / f'step_times-{name}.json'
  if not path.exists():
    print(f'timing the steps of {len(timed)} arms', flush=True)
    cases = {name: _Stepping(job.config) for name, job in timed.items()}
    seconds = timing.interleave(cases, seconds=_SECONDS)
    first = seconds[study.timed[0]]
    spreads = {name: timing.ratio(s, first) for name, s in seconds.items()}
    written = {n: [s.low, s.median, s.high] for n, s in spreads.items()}
    output.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_text(path, json.dumps(written, indent=2) + '\n')
  quartiles = json.loads(path.read_text(encoding='utf-8'))
  return {name: timing.Spread(*values) for name, values in quartiles.items()}


class _Stepping:
  """A run of which each call takes a few more steps."""

  def __init__(self, config: ml_collections.ConfigDict):
    with tempfile.TemporaryDirectory() as folder:
      self._run = set_up(run_config.read(config), folder)
    self._state = self._run.programs.init_state()
    self._batches = self._run.batches(0)

  def __call__(self) -> None:
    """Takes the steps and waits for the result."""
    for _ in range(_STEPS):
      self._state, _ = self._run.train_step(self._state, next(self._batches))
    jax.block_until_ready(self._state)
