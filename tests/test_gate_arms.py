"""The arms with the topology-aware gate train, and their shares add up."""

import jax
import numpy as np
import pytest

from experiments.faster_moe import gate_arms
from experiments.study import runner
from experiments.study.jobs import layered
from experiments.study.parts import Figure, Preset
from experiments.study.runner import TrainingRunner
from experiments.study.study import Study
from moe_jax import run_config, sections
from moe_jax.run_config import RunConfig
from moe_jax.sections import merge

STUDY = Study(
  name='gate_arms',
  title='What does the topology-aware gate cost?',
  source='FasterMoE, Table 3',
  config=gate_arms.config,
  arms=gate_arms.arms,
  presets={'quick': Preset(4, 1), 'full': Preset(4, 1)},
  columns=gate_arms.COLUMNS,
  claims=gate_arms.CLAIMS,
  figure=Figure(['loss', gate_arms.KEPT], 'share that may leave'),
  runner=TrainingRunner(gate_arms.shares),
)


def test_arms_differ_in_who_may_leave():
  shared, limits = STUDY.shared(STUDY.presets['quick']), {}
  for arm in gate_arms.arms():
    config = layered(RunConfig, shared, arm.overrides)
    options = run_config.read(config)
    router, S = options.model.moe.router, options.data.seq_len
    assert options.model.moe.group_size == 0 and router.num_nodes == 2
    limits[arm.name] = router.variant, router.limit(S)
  assert limits == {
    'gate, 1': ('published', 64),
    'gate, 0.5': ('published', 32),
    'gate, 0.14': ('published', 8),
    'gate, 0': ('published', 0),
    gate_arms.SHIPPED: ('fastmoe', 8),
  }


@pytest.mark.slow
def test_arms_run_and_their_shares_are_those_of_their_limits(tmp_path):
  shared = merge(STUDY.shared(STUDY.presets['quick']), {'batch_size': 4})
  shared = sections.lock(RunConfig, shared.unlock())
  results = {}
  for job in STUDY.jobs(shared, gate_arms.arms(), [0], tmp_path, {}):
    result = runner.train(job, gate_arms.shares, jax.devices()[:1])
    results[job.arm.name] = result
    wanting = result['gate/wanting']
    kept, leaving = result['gate/kept_at_home'], result['gate/leaving']
    np.testing.assert_allclose(wanting, kept + leaving)
    assert 0.3 < wanting <= 1
    for column in gate_arms.COLUMNS[:2]:
      assert np.isfinite(result[column.key])
  shares = [results[gate_arms.name_of(s)] for s in gate_arms.SHARES]
  assert shares[0]['gate/kept_at_home'] == 0
  # Half of 64, eight of 64 and none.
  most = [result['gate/leaving'] for result in shares[1:]]
  np.testing.assert_allclose(most, [0.5, 0.125, 0.0], atol=0.01)
