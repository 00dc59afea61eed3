"""Bursts of step times are kept, and those of a busy machine made up for."""

import json

import pytest

from experiments.study import times
from experiments.study.jobs import jobs_of
from experiments.study.parts import Arm
from moe_jax.run_config import RunConfig
from tests.training import tiny


@pytest.mark.slow
def test_bursts_are_kept_and_those_of_a_busy_machine_made_up_for(
  tmp_path, monkeypatch
):
  effort = {'steps': 1, 'seconds': 0.01, 'quick': True}
  monkeypatch.setattr(times, '_EFFORT', effort)
  cores = 100  # nothing that other processes use is too much
  monkeypatch.setattr(times.os, 'cpu_count', lambda: cores)
  model = {'num_layers': 1, 'moe': {'layers': 'all'}}
  shared = tiny.config(batch_size=8, mesh={'data': -1}, model=model)
  arms = [Arm('dense', {'model.moe.num_experts': 0}), Arm('sparse', {})]
  jobs = jobs_of(RunConfig, shared, arms, [3], tmp_path)
  groups = [['dense', 'another', 'sparse']]
  # Bursts belong to the programs of their steps, which are traced once here.
  digest, digests = times.program_digest, {}
  dense, sparse = (
    digests.setdefault(id(job.config), digest(job.config)) for job in jobs
  )
  assert digest(jobs[0].config) == dense != sparse
  monkeypatch.setattr(
    times, 'program_digest', lambda config: digests[id(config)]
  )
  first = times.step_times(groups, jobs, tmp_path)
  assert list(first) == ['dense', 'sparse'] and first['dense'] == 1.0
  assert first['sparse'].seconds[0] > 0 and len(first['sparse'].ratios) == 1
  (path,) = tmp_path.glob('step_bursts-*.json')

  def stored_bursts():
    return json.loads(path.read_text())

  def write_others(others):
    """Writes what other processes used in each burst to the file."""
    bursts = [
      {**burst, 'others': used}
      for burst, used in zip(stored_bursts(), others, strict=True)
    ]
    path.write_text(json.dumps(bursts))

  # Another burst is measured for a busy one, and the less disturbed is taken.
  monkeypatch.setattr(
    times, '_fresh', lambda configs: times.measured(configs, **effort)
  )
  write_others([10.0])
  again = times.step_times(groups, jobs, tmp_path)
  assert len(stored_bursts()) == 2 and again['sparse'].others < 5
  assert len(again['sparse'].ratios) == 1
  monkeypatch.setattr(times, 'measured', None)
  # On a machine that stays busy three are enough.
  path.write_text(json.dumps([*stored_bursts(), stored_bursts()[0]]))
  write_others([10.0, 8.0, 9.0])
  busy = times.step_times(groups, jobs, tmp_path)
  assert busy['sparse'].others == 8.0
