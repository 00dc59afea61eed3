"""FasterMoE: its simulator by hand and by formula; arms with its gate."""

import jax
import numpy as np
import pytest

from experiments import fastermoe_sim, fastermoe_tables
from experiments.faster_moe import clusters, expert_counts, gate_arms, simulate
from experiments.faster_moe.clusters import Cluster
from experiments.faster_moe.expert_counts import Chosen, Counts
from experiments.study import runner
from experiments.study.jobs import layered
from experiments.study.parts import Preset
from moe_jax import run_config
from moe_jax.analysis import traces
from moe_jax.config import merge
from moe_jax.parallel import cost_model
from moe_jax.parallel.cost_model import Sizes
from moe_jax.run_config import RunConfig
from tests.analysis.random_choices import random_choices
from tests.parallel.test_cost_model import TWO_BY_TWO
from tests.training import tiny

# Two nodes of two devices, with a quarter of the bandwidth between them.
SMALL = Cluster(TWO_BY_TWO, 50.0, 100.0, 2, 2, '', 'for tests')
SIZES = Sizes(M=10, F=5, bytes_per_element=2)


def choices_of(expert, logits=None, E=4) -> Chosen:
  return Chosen(np.array(expert), logits, E)


def test_tokens_are_laid_over_devices_in_blocks():
  # Devices have tokens 0-1, 2-3, 4-5 and 6-7; token 6 is padding.
  experts = [[0, 1], [0, 2], [1, 0], [3, 0], [2, 3], [2, 0], [-1, -1], [3, 0]]
  counts = expert_counts.counts_of(
    [choices_of(experts)], SMALL, tokens_per_device=6
  )
  expected = [[2, 2, 1, 1], [1, 1, 0, 0], [1, 0, 2, 0], [0, 1, 1, 1]]
  assert (counts.counts[0] == 3 * np.array(expected)).all()
  assert counts.rows == 3.0
  assert counts.gated is None  # for lack of logits


def test_the_gate_keeps_the_highest_scores_and_what_is_local():
  # Node 0 has devices 0 and 1 and experts 0 and 1. One token of two may leave.
  experts = [2, 3, 0, 2, 0, 1, 2, 3]
  scores = [0.9, 0.8, 0.4, 0.4, 0.4, 0.9, 0.5, 0.5]
  logits = np.tile([0.0, 0.01, 0.02, 0.03], (8, 1))
  logits[range(8), experts] = scores
  chosen = choices_of(np.array(experts)[:, None], logits)
  counts = expert_counts.counts_of([chosen], SMALL, outgoing=0.5)
  # Device 0 sends token 0 to expert 2, and device 2 the token that likes expert
  # 1; the devices 1 and 3 have one remote token and none.
  expected = [[0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 1]]
  assert counts.gated[0].tolist() == expected
  assert counts.outgoing == 0.5
  # All may leave, so that the gate changes nothing.
  free = expert_counts.counts_of([chosen], SMALL)
  assert (free.gated == free.counts).all()


def test_draws_have_the_skew_of_the_paper():
  (draw,) = expert_counts.drawn('skewed', 16, 20000, 1)
  shares = np.sort(np.bincount(draw.expert[:, 0], minlength=16) / 20000)
  np.testing.assert_allclose(shares[-4:], 0.2, atol=0.02)
  np.testing.assert_allclose(shares[:-4], 0.2 / 12, atol=0.005)


def written_trace(folder, steps=3):
  """A trace of two sparse layers with 16 experts, and its choices."""
  rng = np.random.default_rng(0)
  B, T, E, K = 4, 8, 16, 2
  infos = {i: traces.LayerInfo(E, K) for i in (1, 3)}
  header = traces.Header(infos, B, T, 10, has_logits=True)
  ids = np.ones((B, T), np.int32)

  def layer(info):
    logits = rng.normal(size=(B, T, E)).astype(np.float16)
    choices = random_choices(rng, info, ids > 0)
    return choices._replace(logits=logits)

  records = [
    traces.Record(
      'train',
      s,
      0,
      ids,
      ids,
      ids,
      {i: layer(info) for i, info in infos.items()},
    )
    for s in range(steps)
  ]
  traces.write(folder, header, records)
  return records


def test_a_trace_is_read_as_counts(tmp_path):
  records = written_trace(tmp_path / 'trace')
  johnny = clusters.CLUSTERS['johnny']
  counts = expert_counts.counts_of(
    expert_counts.recorded(tmp_path / 'trace', most=2), johnny
  )
  order = [(records[step], layer) for step in (0, 2) for layer in (1, 3)]
  for (record, layer), found in zip(order, counts.counts, strict=True):
    expert = record.layers[layer].expert.reshape(16, 2 * 2)  # 2 tokens a device
    for w in range(16):
      assert (found[:, w] == np.bincount(expert[w], minlength=16)).all()


def test_arms_by_formula():
  rng = np.random.default_rng(1)
  counts = rng.integers(0, 40, (5, 4, 4)) ** 2
  arms = simulate.simulate(SMALL, Counts(counts, counts, 1.0), SIZES)
  base = arms[simulate.SYNCHRONOUS]
  step = cost_model.step(TWO_BY_TWO, counts, SIZES)
  np.testing.assert_allclose(base.seconds, step.sequential)
  np.testing.assert_allclose(base.ratio, step.ratio)
  assert base.largest.tolist() == counts.sum(2).max(1).tolist()
  flops = 3 * SIZES.row_flops * counts.sum((1, 2)) / 4 / base.seconds
  np.testing.assert_allclose(base.flops, flops)
  assert simulate.numbers(base, base)['speed_up'] == 1.0
  for arm in arms.values():  # none is faster than if all overlapped
    assert (arm.seconds >= arm.bound * (1 - 1e-9)).all()


def test_four_equal_experts_stop_the_printed_rule_at_the_first():
  # Four of 16 experts have a fifth of the tokens each, as in the paper.
  johnny = clusters.CLUSTERS['johnny']
  sizes = Sizes(clusters.WIDTH, clusters.HIDDEN, 4)
  counts = np.full((1, 16, 16), 68)
  counts[:, [1, 6, 9, 12]] = 819
  arms = simulate.simulate(johnny, Counts(counts, None, 1.0), sizes)
  number = {name: int(arm.shadowed[0].sum()) for name, arm in arms.items()}
  assert number[simulate.SHADOWED] == 1
  assert number[simulate.BEST_NUMBER] == 4
  seconds = {name: float(arm.seconds[0]) for name, arm in arms.items()}
  assert seconds[simulate.SHADOWED] > seconds[simulate.SYNCHRONOUS]
  assert 1.5 * seconds[simulate.BEST_NUMBER] < seconds[simulate.SYNCHRONOUS]
  assert simulate.GATED not in arms


def test_the_command_says_that_all_is_simulated(tmp_path, monkeypatch):
  monkeypatch.setattr(fastermoe_sim, 'DRAWN', 16)
  written_trace(tmp_path / 'trace')
  folder = fastermoe_sim.main(
    [f'--trace={tmp_path / "trace"}', '--counts=skewed', '--steps=2']
    + ['--topology=johnny', '--topology=trevor']
    + [f'--output={tmp_path / "out"}']
  )
  text = (folder / 'table.md').read_text(encoding='utf-8')
  assert 'num_experts=16 is not divisible by the 64 devices of trevor' in text
  assert text.count('| SIMULATED |') == text.count('\nSIMULATED, ') == 3
  assert 'up to 1.95 (' in text and 'nan' not in text
  # The trace has logits, and the draws have none.
  assert text.count('No gate, for lack of ') == 2
  assert (folder / 'roofline.png').exists()


def test_the_layer_of_any_config():
  argv = ['--config=configs/mixtral_8x7b.py', '--steps=1']
  options = fastermoe_sim.parse(argv)
  assert fastermoe_sim.sizes_of(options) == Sizes(4096, 14336, kernels=3)
  assert fastermoe_sim.sizes_of(fastermoe_sim.parse([])) == Sizes(2048, 4096)


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
