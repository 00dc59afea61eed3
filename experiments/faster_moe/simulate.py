"""SIMULATED seconds of a layer with each of FasterMoE's parts (cost model)."""

import types
from typing import NamedTuple

import numpy as np

from experiments.faster_moe.clusters import GROUP, Cluster
from experiments.faster_moe.expert_counts import Counts
from moe_jax.parallel import cost_model, shadowing
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.shadowing import Speeds
from moe_jax.shapes import Bool, Float, Int

# Batches whose exchanges are computed at once, which bounds memory.
_AT_ONCE = 64
# Which experts are shadowed: by Algorithm 1, or as many of the most popular
# ones as make a synchronous step fastest by this model, which is what a better
# rule than the paper's could gain.
RULE, BEST = 'algorithm_1', 'best'


class Arm(NamedTuple):
  """A way to run a layer.

  Attributes:
    shadows: `RULE` or `BEST`; '' shadows no expert.
    scheduled: Whether exchange and products overlap by the smart schedule.
    gated: Whether the topology-aware gate limits what leaves a node.
    published: Column of the paper's table of speed-ups; '' for none.
  """

  shadows: str = ''
  scheduled: bool = False
  gated: bool = False
  published: str = ''


SYNCHRONOUS = 'synchronous'
SHADOWED = 'shadowed'
BEST_NUMBER = 'best number shadowed (ours)'
SCHEDULED = 'scheduled'
BOTH = 'scheduled and shadowed'
BOTH_BEST = f'scheduled, {BEST_NUMBER}'
GATED = 'gated'
ALL = 'gated, scheduled and shadowed'
ARMS = types.MappingProxyType(
  {
    SYNCHRONOUS: Arm(),
    SHADOWED: Arm(RULE, published='shadowing_alone'),
    BEST_NUMBER: Arm(BEST),
    SCHEDULED: Arm(scheduled=True, published='schedule_alone'),
    BOTH: Arm(RULE, scheduled=True, published='vs_fastmoe'),
    BOTH_BEST: Arm(BEST, scheduled=True),
    GATED: Arm(gated=True),
    ALL: Arm(RULE, scheduled=True, gated=True),
  }
)


def published(cluster: Cluster, arm: str) -> str:
  """Name of the paper's speed-up of an arm in `claims.json`; '' for none."""
  column = ARMS[arm].published
  if not (cluster.published and column):
    return ''
  return f'fastermoe2022/throughput/{cluster.published}/{column}'


class Simulated(NamedTuple):
  """The simulated training steps of one arm, one for each batch and layer.

  Attributes:
    seconds: Seconds of the step of the layer's experts.
    bound: Seconds if all that is sent and all products overlapped.
    ratio: Seconds of products over those of what is sent.
    flops: Mean FLOPs per second of a device.
    shadowed: Whether each expert is shadowed.
    uneven: Largest over mean number of rows of an expert.
    largest: n_max, rows of the busiest device before experts are shadowed.
  """

  seconds: Float[np.ndarray, ' R']
  bound: Float[np.ndarray, ' R']
  ratio: Float[np.ndarray, ' R']
  flops: Float[np.ndarray, ' R']
  shadowed: Bool[np.ndarray, 'R E']
  uneven: Float[np.ndarray, ' R']
  largest: Int[np.ndarray, ' R']


def simulate(
  cluster: Cluster, counts: Counts, sizes: Sizes
) -> dict[str, Simulated]:
  """Simulates all arms; those with a gate only where it has been applied."""
  simulated = {}
  for name, arm in ARMS.items():
    rows = counts.gated if arm.gated else counts.counts
    if rows is not None:
      parts = np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE))
      steps = [_simulate(arm, cluster, part, sizes) for part in parts]
      simulated[name] = Simulated(*map(np.concatenate, zip(*steps)))
  return simulated


def _simulate(
  arm: Arm, cluster: Cluster, counts: Int[np.ndarray, 'R E W'], sizes: Sizes
) -> Simulated:
  (R, E, W), machine = counts.shape, cluster.topology
  shadowed = np.zeros((R, E + 1), bool)  # the last is of unused places
  if arm.shadows == RULE:
    speeds = Speeds.of_bytes(machine.flops_per_second, cluster.network, sizes)
    for mask, one in zip(shadowed, counts, strict=True):
      mask[shadowing.choose(one, sizes, speeds, most=E)] = True
  shadowed = shadowed[:, :E]
  if arm.shadows == BEST:
    shadowed = _best(cluster, counts, sizes)
  step = cost_model.step(machine, counts, sizes, shadowed=shadowed)
  seconds = step.sequential
  if arm.scheduled:
    seconds = cost_model.step(
      machine, counts, sizes, num_groups=W // GROUP, shadowed=shadowed
    ).scheduled
  load = counts.sum(-1)
  return Simulated(
    seconds,
    step.overlapped,
    step.ratio,
    achieved(cluster, sizes, load.sum(-1), seconds),
    shadowed,
    load.max(-1) / load.mean(-1),
    counts.reshape(R, W, -1).sum(-1).max(-1),
  )


def _best(
  cluster: Cluster, counts: Int[np.ndarray, 'R E W'], sizes: Sizes
) -> Bool[np.ndarray, 'R E']:
  """The most popular experts, up to half of them, that save most seconds."""
  order = np.argsort(-counts.sum(-1), axis=-1, kind='stable')
  rank = np.argsort(order, axis=-1)  # each expert's, by popularity
  machine = cluster.topology
  seconds = [
    cost_model.step(machine, counts, sizes, shadowed=rank < r).sequential
    for r in range(counts.shape[1] // 2 + 1)
  ]
  return rank < np.argmin(seconds, 0)[:, None]


def achieved(
  cluster: Cluster,
  sizes: Sizes,
  rows: Int[np.ndarray, ' N'],
  seconds: Float[np.ndarray, ' N'],
) -> Float[np.ndarray, ' N']:
  """The mean FLOPs per second of a device in training steps.

  They are y in Figure 4 of FasterMoE, the roofline of a layer.

  Args:
    cluster: The machine.
    sizes: The sizes of the experts.
    rows: Number of rows of all devices, of each step.
    seconds: Seconds of each step.
  """
  return 3 * sizes.row_flops * rows / (cluster.num_devices * seconds)


def numbers(base: Simulated, arm: Simulated) -> dict[str, float]:
  """The numbers of an arm over all batches and layers, by name.

  Args:
    base: The synchronous arm.
    arm: The arm.

  Returns:
    speed_up: over the synchronous arm, of all batches and layers together.
    best: that of the batch and layer where it is largest.
    reached: the bound of overlap over the time.
    shadowed: the mean share of experts that are shadowed.
    uneven: the mean of the largest over the mean number of rows of an expert.
  """
  return {
    'speed_up': float(base.seconds.sum() / arm.seconds.sum()),
    'best': float((base.seconds / arm.seconds).max()),
    'reached': float(arm.bound.sum() / arm.seconds.sum()),
    'shadowed': float(arm.shadowed.sum(-1).mean()) / arm.shadowed.shape[-1],
    'uneven': float(arm.uneven.mean()),
  }


def even_points(
  cluster: Cluster, sizes: Sizes
) -> tuple[Float[np.ndarray, ' N'], Float[np.ndarray, ' N']]:
  """Synchronous layers of even rows and many hidden widths on the roofline.

  Returns:
    Computation over communication, and FLOPs per second of a device.
  """
  counts = np.full((1, cluster.num_devices, cluster.num_devices), 64)
  points = []
  for factor in 2.0 ** np.arange(-3, 7):
    wide = sizes._replace(F=max(int(sizes.F * factor), 1))
    step = cost_model.step(cluster.topology, counts, wide)
    flops = achieved(cluster, wide, counts.sum((1, 2)), step.sequential)
    points.append((step.ratio[0], flops[0]))
  ratios, flops = np.array(points).T
  return ratios, flops
