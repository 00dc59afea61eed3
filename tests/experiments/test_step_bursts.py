"""Bursts of step times are kept, and those of a busy machine made up for."""

import functools
import json

import pytest

from experiments.study import times
from experiments.study.jobs import jobs_of
from experiments.study.parts import Arm
from moe_jax.analysis import roofline
from moe_jax.run_config import RunConfig
from tests.training import tiny


@pytest.mark.slow
def test_bursts_are_kept_and_those_of_a_busy_machine_made_up_for(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(times.os, 'cpu_count', lambda: 2)
  monkeypatch.setattr(times, '_SECONDS', 0.01)
  monkeypatch.setattr(times, '_STEPS', 1)
  quick = functools.partial(roofline.measure_peaks, quick=True)
  monkeypatch.setattr(roofline, 'measure_peaks', quick)
  shared = tiny.config(batch_size=8, mesh={'data': -1})
  arms = [Arm('dense', {'model.moe.num_experts': 0}), Arm('sparse', {})]
  jobs = jobs_of(RunConfig, shared, arms, [3], tmp_path)
  groups = [['dense', 'another', 'sparse']]
  # Bursts belong to the programs of their steps.
  dense, again, sparse = (
    times._Stepping(job.config).digest() for job in (jobs[0], *jobs)
  )
  assert dense == again != sparse
  first = times.step_times(groups, jobs, tmp_path)
  assert list(first) == ['dense', 'sparse'] and first['dense'] == 1.0
  assert first['sparse'].seconds[0] > 0 and len(first['sparse'].ratios) == 1
  (path,) = tmp_path.glob('step_bursts-*.json')

  def kept():
    return json.loads(path.read_text())

  def said(others):
    """Writes what other processes used in each burst to the file."""
    bursts = [
      {**burst, 'others': used}
      for burst, used in zip(kept(), others, strict=True)
    ]
    path.write_text(json.dumps(bursts))

  # Another burst is measured for a busy one, and the less disturbed is taken.
  said([0.5] * len(kept()))
  times.step_times(groups, jobs, tmp_path)
  assert len(kept()) > 1
  said([0.5, *[0.02] * (len(kept()) - 1)])
  monkeypatch.setattr(times, '_Measuring', None)
  again = times.step_times(groups, jobs, tmp_path)
  assert again['sparse'].others == 0.02 and len(again['sparse'].ratios) == 1
  # On a machine that stays busy three are enough.
  three = [*kept(), *kept(), *kept()][:3]
  path.write_text(json.dumps(three))
  said([0.5, 0.3, 0.4])
  busy = times.step_times(groups, jobs, tmp_path)
  assert busy['sparse'].others == 0.3
