"""The simulator of FasterMoE: counts by hand, arms by formula, the command."""

import csv

import numpy as np
import pytest

from experiments import fastermoe_sim
from experiments.faster_moe import (
  clusters,
  expert_counts,
  simulate,
  simulated_tables,
)
from experiments.faster_moe.clusters import Cluster
from experiments.faster_moe.expert_counts import Chosen, Counts
from moe_jax.analysis import traces
from moe_jax.parallel import cost_model
from moe_jax.parallel.cost_model import Sizes
from tests.parallel.test_cost_model import TWO_BY_TWO

# Two nodes of two devices, with a quarter of the bandwidth between them.
SMALL = Cluster(TWO_BY_TWO, 50.0, 100.0, 2, 2, '', 'for tests')
SIZES = Sizes(M=10, F=5, bytes_per_element=2)


def test_the_clusters_are_the_papers():
  johnny, trevor = clusters.get('johnny'), clusters.get('trevor')
  assert (johnny.num_devices, trevor.num_devices) == (16, 64)
  assert johnny.network * 8 == 50e9 and trevor.network * 8 == 100e9
  assert johnny.topology.flops_per_second == 0.9 * 14e12
  # L = beta_net / (m beta_local) n.
  np.testing.assert_allclose(johnny.outgoing, 6.25 / (8 * 15.75))
  np.testing.assert_allclose(trevor.outgoing, 12.5 / (4 * 150))
  assert (johnny.num_groups, trevor.num_groups) == (4, 16)
  slice_ = clusters.get('tpu:4x4')
  assert (slice_.num_devices, slice_.num_nodes) == (16, 1)
  for cluster in (johnny, trevor, slice_):
    assert 'assumed' in cluster.sources
  half = clusters.get('johnny', 'float16')
  assert half.bytes_per_element == 2
  with pytest.raises(ValueError, match="unknown topology 'johny'"):
    clusters.get('johny')
  with pytest.raises(ValueError, match="unknown dtype 'float64'"):
    clusters.get('johnny', 'float64')


def test_any_nodes_can_be_described():
  cluster = clusters.get('nodes:2x4:local=100:network=20:teraflops=10')
  assert (cluster.num_devices, cluster.num_nodes) == (8, 2)
  # 8 GB from each device of a node to the other node's: 32 GB on its uplink.
  sent_bytes = np.zeros((8, 8))
  sent_bytes[:4, 4] = 8e9
  traffic = cluster.topology.all_to_all(sent_bytes)
  assert cluster.topology.seconds(traffic) == 32e9 / 20e9
  assert cluster.topology.flops_per_second == 1e13
  with pytest.raises(ValueError, match='nodes:2x4:local=0'):
    clusters.get('nodes:2x4:local=0:network=20:teraflops=10')


def choices_of(expert, gate=None, logits=None, E=4) -> Chosen:
  expert = np.array(expert)
  gate = np.ones(expert.shape) if gate is None else np.array(gate, float)
  return Chosen(0, 0, expert, gate, logits, E)


def test_tokens_are_laid_over_devices_in_blocks():
  # Devices have tokens 0-1, 2-3, 4-5 and 6-7; token 6 is padding.
  experts = [[0, 1], [0, 2], [1, 0], [3, 0], [2, 3], [2, 0], [-1, -1], [3, 0]]
  counts = expert_counts.counts_of(
    [choices_of(experts)], SMALL, tokens_per_device=6, outgoing=1.0
  )
  expected = [[2, 2, 1, 1], [1, 1, 0, 0], [1, 0, 2, 0], [0, 1, 1, 1]]
  assert (counts.counts[0] == 3 * np.array(expected)).all()
  assert counts.rows == 3.0
  # All may leave, so that the gate changes nothing.
  assert (counts.gated == counts.counts).all()


def test_the_gate_keeps_the_highest_scores_and_what_is_local():
  # Node 0 has devices 0 and 1 and experts 0 and 1. One token of two may leave.
  experts = [[2], [3], [0], [2], [0], [1], [2], [3]]
  gates = [[0.9], [0.8], [0.4], [0.4], [0.4], [0.9], [0.5], [0.5]]
  counts = expert_counts.counts_of(
    [choices_of(experts, gates)], SMALL, outgoing=0.5
  ).gated[0]
  assert counts.sum() == 8
  # Device 0 sends token 0 to expert 2, and device 2 has one remote token only,
  # as device 1 has.
  assert counts[2, 0] == 1 and counts[:2, 0].sum() == 1
  assert counts[0, 1] == counts[2, 1] == 1
  assert counts[1, 2] == 1 and counts[:2, 2].sum() == 1
  assert counts[2, 3] == counts[3, 3] == 1


def test_with_logits_tokens_choose_their_best_local_expert():
  logits = np.array([[1, 2, 9, 0], [2, 1, 8, 0]] * 4, float)
  counts = expert_counts.counts_of(
    [choices_of([[2]] * 8, logits=logits)], SMALL, outgoing=0.0
  ).gated[0]
  expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 2], [0, 0, 0, 0]]
  assert (counts == expected).all()


def test_draws_have_the_skew_of_the_paper():
  (draw,) = expert_counts.drawn('skewed', 16, 20000, 1)
  shares = np.sort(np.bincount(draw.expert[:, 0], minlength=16) / 20000)
  np.testing.assert_allclose(shares[-4:], 0.2, atol=0.02)
  np.testing.assert_allclose(shares[:-4], 0.2 / 12, atol=0.005)
  with pytest.raises(ValueError, match="unknown counts 'zipf'"):
    next(expert_counts.drawn('zipf', 16, 8, 1))
  # Four experts are popular, so that none is left for the other tokens.
  with pytest.raises(expert_counts.DoesNotDivide, match='num_experts=4'):
    next(expert_counts.drawn('skewed', 4, 8, 1))


def test_what_does_not_divide_is_refused():
  indivisible = [choices_of([[0]] * 8, E=6)]
  with pytest.raises(ValueError, match='num_experts=6 is not divisible by the'):
    expert_counts.counts_of(indivisible, SMALL)
  with pytest.raises(ValueError, match='tokens of a batch=7 is not divisible'):
    expert_counts.counts_of([choices_of([[0]] * 7)], SMALL)
  with pytest.raises(ValueError, match='no choices'):
    expert_counts.counts_of([], SMALL)


def written_trace(folder, steps=3):
  """A trace of two sparse layers with 16 experts, and its choices."""
  rng = np.random.default_rng(0)
  B, T, E, K = 4, 8, 16, 2
  infos = {i: traces.LayerInfo(E, K) for i in (1, 3)}
  header = traces.Header(infos, B, T, 10)
  ids = np.ones((B, T), np.int32)

  def layer():
    expert = rng.permuted(np.tile(np.arange(E), (B * T, 1)), axis=1)[:, :K]
    expert = expert.reshape(B, T, K).astype(np.int32)
    gate = np.full(expert.shape, 0.5, np.float32)
    return traces.LayerChoices(expert, gate, np.ones(expert.shape, bool))

  records = [
    traces.Record('train', s, 0, ids, ids, ids, {i: layer() for i in infos})
    for s in range(steps)
  ]
  traces.write(folder, header, records)
  return records


def test_a_trace_is_read_as_counts(tmp_path):
  records = written_trace(tmp_path / 'trace')
  johnny = clusters.get('johnny')
  counts = expert_counts.counts_of(
    expert_counts.recorded(tmp_path / 'trace', most=2), johnny
  )
  assert counts.step.tolist() == [0, 0, 2, 2]
  assert counts.layer.tolist() == [1, 3, 1, 3]
  expert = records[2].layers[3].expert.reshape(16, 2 * 2)  # 2 tokens a device
  for w in range(16):
    expected = np.bincount(expert[w], minlength=16)
    assert (counts.counts[3, :, w] == expected).all()


def test_arms_by_formula():
  rng = np.random.default_rng(1)
  counts = rng.integers(0, 40, (5, 4, 4)) ** 2
  arms = simulate.simulate(
    SMALL, Counts(np.arange(5), np.zeros(5, int), counts, counts, 1.0), SIZES
  )
  simulate.check_bound(arms)
  assert set(arms) == set(simulate.ARMS)
  base = arms[simulate.SYNCHRONOUS]
  for i, layer in enumerate(counts):
    latency = cost_model.latency(TWO_BY_TWO, layer, SIZES)
    np.testing.assert_allclose(base.seconds[i], latency.synchronous)
    np.testing.assert_allclose(base.ratio[i], latency.ratio)
    achieved = cost_model.achieved(
      TWO_BY_TWO, SIZES, latency.rows, latency.synchronous
    )
    np.testing.assert_allclose(base.flops[i], achieved)
    assert base.largest[i] == layer.sum(1).max()
  best = arms[simulate.BEST_NUMBER]
  assert (best.seconds <= base.seconds * (1 + 1e-12)).all()
  assert simulate.speed_up(base, base) == (1.0, 1.0)
  faster = dict(arms, wrong=base._replace(seconds=base.bound / 2))
  with pytest.raises(ValueError, match="'wrong' is faster than its bound"):
    simulate.check_bound(faster)


def test_four_equal_experts_stop_the_printed_rule_at_the_first():
  # Four of 16 experts have a fifth of the tokens each, as in the paper.
  johnny = clusters.get('johnny')
  sizes = Sizes(clusters.WIDTH, clusters.HIDDEN, 4)
  counts = np.full((1, 16, 16), 68)
  counts[:, [1, 6, 9, 12]] = 819
  arms = simulate.simulate(
    johnny, Counts(np.zeros(1), np.zeros(1), counts, None, 1.0), sizes
  )
  number = {name: int(arm.shadowed[0]) for name, arm in arms.items()}
  assert number[simulate.SHADOWED] == 1 and number[simulate.SHIPPED] == 0
  assert number[simulate.BEST_NUMBER] == 4
  seconds = {name: float(arm.seconds[0]) for name, arm in arms.items()}
  assert seconds[simulate.SHADOWED] > seconds[simulate.SYNCHRONOUS]
  assert 1.5 * seconds[simulate.BEST_NUMBER] < seconds[simulate.SYNCHRONOUS]
  assert simulate.GATED not in arms


def test_synchronous_points_of_the_roofline_lie_on_its_curve():
  for cluster in (clusters.get('johnny'), clusters.get('tpu:2x4'), SMALL):
    ratio, flops = simulate.even_points(cluster, SIZES)
    curve = cost_model.semi_ideal(cluster.topology.flops_per_second, ratio)
    np.testing.assert_allclose(flops, curve, rtol=1e-12)


def test_the_command_says_that_all_is_simulated(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(fastermoe_sim, 'DRAWN', 16)
  written_trace(tmp_path / 'trace')
  folder = fastermoe_sim.main(
    [f'--trace={tmp_path / "trace"}', '--counts=skewed', '--steps=2']
    + ['--topology=johnny', '--topology=tpu:5']
    + [f'--output={tmp_path / "out"}']
  )
  text = (folder / 'table.md').read_text(encoding='utf-8')
  assert text == capsys.readouterr().out.partition('\nwritten')[0]
  assert f'Made by `python -m experiments.fastermoe_sim --trace={tmp_path}' in (
    text
  )
  assert 'num_experts=16 is not divisible by the 5 devices of tpu:5' in text
  assert text.count('| SIMULATED |') == text.count('\nSIMULATED, ') == 3
  assert 'up to 1.95 *' in text and 'nan' not in text
  with (folder / 'rows.csv').open(encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 9 * (2 * 2 + 2) + 7 * 2
  assert all(name.startswith('simulated_') for name in [*rows[0]][5:])
  for row in rows:
    above = float(row['simulated_n_max']) > float(row['simulated_r_F'])
    assert row['simulated_n_max_above_r_F'] == str(above)
  pictures = {path.name for path in folder.glob('*.png')}
  assert pictures == {'roofline.png', 'seconds.png', 'speed_ups.png'}


@pytest.mark.parametrize(
  ('topology', 'outgoing', 'applied', 'note'),
  [
    # A share of 0.3 is 4 of 16 tokens, and the formula's 0.0496 is none.
    ('johnny', 0.3, 0.25, 'lets 25.0 % of '),
    ('johnny', 0.3, 0.25, ' (as given, rounded down to whole tokens).'),
    ('johnny', -1, 0.0, " (by the paper's formula, rounded down to whole "),
    ('tpu:2x2', 0.3, 1.0, 'No gate: tpu:2x2 is not divided into nodes.'),
  ],
)
def test_headings_tell_the_gate(topology, outgoing, applied, note, monkeypatch):
  monkeypatch.setattr(fastermoe_sim, 'DRAWN', 16)
  argv = ['--counts=uniform', '--steps=1', f'--topology={topology}']
  options = fastermoe_sim.parse([*argv, f'--outgoing={outgoing}'])
  ((case,), _) = fastermoe_sim.cases(options)
  text = simulated_tables.heading(case)
  assert note in text and ', 1 step of 1 layer, ' in text
  assert case.counts.outgoing == applied


def test_a_roofline_of_any_config(tmp_path, monkeypatch):
  monkeypatch.setattr(fastermoe_sim, 'DRAWN', 16)
  argv = ['--roofline', '--config=configs/mixtral_8x7b.py', '--steps=1']
  argv += ['--topology=tpu:2x2x3', f'--output={tmp_path}']
  fastermoe_sim.main(argv)
  assert [path.name for path in tmp_path.iterdir()] == ['roofline.png']
  options = fastermoe_sim.parse(argv)
  assert fastermoe_sim.sizes_of(options) == Sizes(4096, 14336, kernels=3)
  options = fastermoe_sim.parse([*argv, '--width=8', '--hidden=9'])
  assert fastermoe_sim.sizes_of(options)[:2] == (8, 9)


def test_wrong_arguments_are_refused(capsys):
  for argument, message in (
    ('--outgoing=2', '--outgoing=2.0 is no share'),
    ('--topology=here', "unknown topology 'here'"),
    ('--config.seed=1', 'unknown arguments'),
  ):
    with pytest.raises(SystemExit):
      fastermoe_sim.main([argument, '--output=/nowhere'])
    assert message in capsys.readouterr().err
