"""SIMULATED figures of a trained run's trace on the described clusters."""

from collections.abc import Iterator, Mapping

import numpy as np

from experiments.faster_moe import clusters, expert_counts, gate_arms, simulate
from experiments.faster_moe.clusters import Cluster
from experiments.faster_moe.expert_counts import Counts
from experiments.faster_moe.simulate import ARMS, SYNCHRONOUS, Simulated
from experiments.study.parts import Column, Result
from moe_jax.analysis.recording import FOLDER
from moe_jax.parallel.cost_model import Sizes
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# The share of tokens that the simulated gate lets leave, as in training.
OUTGOING = 0.14
# Batches of drawn counts, and tokens of a device in each.
STEPS, DRAWN = 20, 256
TRACE, SKEWED = 'trace', 'skewed'
SPEED_UP, BEST_LAYER = 'SIMULATED speed-up', 'SIMULATED best layer'
REACHED, SHADOWED_SHARE = 'SIMULATED bound reached', 'SIMULATED shadowed'
UNEVEN = 'max/mean load'


def columns(prefix: str) -> list[Column]:
  """The columns of the numbers that `numbers` names with that prefix."""
  return [
    Column(SPEED_UP, f'{prefix}/speed_up', 'x', 2),
    Column(BEST_LAYER, f'{prefix}/best', 'x', 2),
    Column(REACHED, f'{prefix}/reached', '%', 0, lambda share: 100 * share),
    Column(
      SHADOWED_SHARE, f'{prefix}/shadowed', '%', 1, lambda share: 100 * share
    ),
    Column(UNEVEN, f'{prefix}/uneven', '', 1),
  ]


def prefix_of(cluster: str, source: str, arm: str) -> str:
  """The beginning of the names of an arm's numbers."""
  return f'simulated/{cluster}/{source}/{arm}'


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """The numbers of a run: simulated ones of its trace, or those of its gate.

  A run with a trace is laid over the clusters that have as many devices as it
  has experts, and so are drawn counts with the seed of the run.
  """
  if not run.options.trace.every_steps:
    return gate_arms.shares(run, state)
  all_numbers: dict[str, float] = {}
  for name in clusters.NAMES:
    cluster = clusters.get(name)
    if cluster.num_devices == run.model.stacks.moe.num_experts:
      for source, counts in _sources(run, cluster):
        for arm, numbers in of_counts(cluster, counts).items():
          beginning = prefix_of(name, source, arm)
          all_numbers |= {f'{beginning}/{k}': v for k, v in numbers.items()}
  return all_numbers


def _sources(run: Run, cluster: Cluster) -> Iterator[tuple[str, Counts]]:
  E, W = run.model.stacks.moe.num_experts, cluster.num_devices
  drawn = expert_counts.drawn(SKEWED, E, W * DRAWN, STEPS, run.options.seed)
  recorded = expert_counts.recorded(run.workdir / FOLDER)
  for source, chosen in ((TRACE, recorded), (SKEWED, drawn)):
    yield (
      source,
      expert_counts.counts_of(
        chosen, cluster, tokens_per_device=clusters.TOKENS, outgoing=OUTGOING
      ),
    )


def of_counts(
  cluster: Cluster, counts: Counts
) -> Mapping[str, Mapping[str, float]]:
  """The numbers of all arms, by name of the arm.

  Returns:
    speed_up: over the synchronous arm, of all batches and layers together.
    best: that of the batch and layer where it is largest.
    reached: the bound of overlap over the time.
    shadowed: the mean share of experts that are shadowed.
    uneven: the mean of the largest over the mean number of rows of an expert.
  """
  sizes = Sizes(clusters.WIDTH, clusters.HIDDEN, cluster.bytes_per_element)
  arms = simulate.simulate(cluster, counts, sizes)
  return {
    name: _numbers(arms[SYNCHRONOUS], arm, counts, ARMS[name].gated)
    for name, arm in arms.items()
  }


def _numbers(
  base: Simulated, arm: Simulated, counts: Counts, gated: bool
) -> dict[str, float]:
  total, best = simulate.speed_up(base, arm)
  load = (counts.gated if gated else counts.counts).sum(-1)
  return {
    'speed_up': total,
    'best': best,
    'reached': simulate.bound_share(arm),
    'shadowed': float(np.mean(arm.shadowed)) / arm.num_experts,
    'uneven': float((load.max(-1) / load.mean(-1)).mean()),
  }


def values(result: Result, prefix: str) -> dict[str, float]:
  """The numbers of an arm in a run's result, by name of the column."""
  return {column.name: column.of(result) for column in columns(prefix)}
