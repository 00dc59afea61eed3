"""The arms with the topology-aware gate train, and their shares add up."""

import jax
import numpy as np
import pytest

from experiments import fastermoe_tables
from experiments.faster_moe import gate_arms
from experiments.study import runner
from experiments.study.jobs import layered
from experiments.study.parts import Preset
from moe_jax import run_config
from moe_jax.config import merge
from moe_jax.run_config import RunConfig
from tests.training import tiny

STUDY = fastermoe_tables.STUDY


def test_arms_differ_in_who_may_leave():
  shared, limits = STUDY.shared(STUDY.presets['quick']), {}
  for arm in gate_arms.arms():
    options = run_config.read(layered(RunConfig, shared, arm.overrides))
    router, S = options.model.moe.router, options.data.seq_len
    assert options.model.moe.group_size == 0 and router.num_nodes == 2
    limits[arm.x] = router.limit(S)
  assert limits == {1: 64, 0.5: 32, 0.14: 8, 0: 0}


@pytest.mark.slow
def test_an_arm_runs_and_its_shares_are_those_of_its_limit(tmp_path):
  small = {
    'batch_size': 4,
    'model': {'num_layers': 1},
    'data': {'source': {'python_stdlib': {'modules': tiny.MODULES}}},
  }
  preset = Preset(4, 1)
  shared = merge(STUDY.shared(preset), small)
  arms = [a for a in gate_arms.arms() if a.x == 0.14]
  ((job,),) = STUDY.runs(preset, shared, arms, [0], tmp_path)
  result = runner.train(job, gate_arms.shares, jax.devices()[:1])
  wanting = result['gate/wanting']
  kept, leaving = result['gate/kept_at_home'], result['gate/leaving']
  np.testing.assert_allclose(wanting, kept + leaving)
  assert 0.3 < wanting <= 1
  for column in gate_arms.COLUMNS:
    assert np.isfinite(column.of(result))
  # Nearly all of the 64 tokens of a group want to leave, and eight may.
  np.testing.assert_allclose(leaving, 8 / 64, atol=0.01)
