"""SIMULATED seconds of a layer with each of FasterMoE's parts (cost model).

Not here: machines (`clusters.py`), the choices of tokens (`expert_counts.py`),
tables and figures.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments.faster_moe.clusters import Cluster
from experiments.faster_moe.expert_counts import Counts
from moe_jax.errors import InputError
from moe_jax.parallel import cost_model, schedule_model, shadowing
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.shadowing_rules import RULES
from moe_jax.shapes import Bool, Float, Int

# Batches whose exchanges are computed at once, which bounds memory.
_AT_ONCE = 64


# As many of the most popular experts are shadowed as make a synchronous step
# fastest by this model: what a better rule than the paper's could gain.
BEST = 'best'


class Arm(NamedTuple):
  """A way to run a layer.

  Attributes:
    rule: Name of the rule that shadows experts, or `BEST`; '' for none.
    scheduled: Whether exchange and products overlap by the smart schedule.
    gated: Whether the topology-aware gate limits what leaves a node.
    published: Column of the paper's table of speed-ups; '' for none.
  """

  rule: str = ''
  scheduled: bool = False
  gated: bool = False
  published: str = ''


SYNCHRONOUS = 'synchronous'
SHADOWED = 'shadowed'
SHIPPED = "shadowed by FastMoE's rule"
BEST_NUMBER = 'best number shadowed (ours)'
SCHEDULED = 'scheduled'
BOTH = 'scheduled and shadowed'
BOTH_BEST = f'scheduled, {BEST_NUMBER}'
GATED = 'gated'
ALL = 'gated, scheduled and shadowed'
ARMS = types.MappingProxyType(
  {
    SYNCHRONOUS: Arm(),
    SHADOWED: Arm('algorithm_1', published='shadowing_alone'),
    SHIPPED: Arm('fastmoe'),
    BEST_NUMBER: Arm(BEST),
    SCHEDULED: Arm(scheduled=True, published='schedule_alone'),
    BOTH: Arm('algorithm_1', scheduled=True, published='vs_fastmoe'),
    BOTH_BEST: Arm(BEST, scheduled=True),
    GATED: Arm(gated=True),
    ALL: Arm('algorithm_1', scheduled=True, gated=True),
  }
)


class Simulated(NamedTuple):
  """The simulated training steps of one arm, one for each batch and layer.

  Attributes:
    seconds: Seconds of the step of the layer's experts.
    bound: Seconds if all that is sent and all products overlapped.
    ratio: Seconds of products over those of what is sent.
    flops: Mean FLOPs per second of a device.
    shadowed: Number of shadowed experts.
    num_experts: E, the number of experts.
    largest: n_max, rows of the busiest device before experts are shadowed.
    pays: Whether n_max > r F, for r shadowed experts, or one where there is
      none; with three kernels F counts for 3/2.
  """

  seconds: Float[np.ndarray, ' R']
  bound: Float[np.ndarray, ' R']
  ratio: Float[np.ndarray, ' R']
  flops: Float[np.ndarray, ' R']
  shadowed: Int[np.ndarray, ' R']
  num_experts: int
  largest: Int[np.ndarray, ' R']
  pays: Bool[np.ndarray, ' R']


def simulate(
  cluster: Cluster, counts: Counts, sizes: Sizes
) -> Mapping[str, Simulated]:
  """Simulates all arms; those with a gate only where there are nodes."""
  return {
    name: _simulate(
      arm, cluster, counts.gated if arm.gated else counts.counts, sizes
    )
    for name, arm in ARMS.items()
    if not (arm.gated and counts.gated is None)
  }


def _simulate(
  arm: Arm, cluster: Cluster, counts: Int[np.ndarray, 'R E W'], sizes: Sizes
) -> Simulated:
  shadowed = _shadowed(arm.rule, cluster, counts, sizes)
  chunks = [
    _steps(arm, cluster, counts[i : i + _AT_ONCE], mask, sizes)
    for i in range(0, len(counts), _AT_ONCE)
    for mask in [shadowed[i : i + _AT_ONCE]]
  ]
  seconds, bound, ratio = map(np.concatenate, zip(*chunks, strict=True))
  number = shadowed.sum(-1)
  largest = np.array([shadowing.rows_of(one).max() for one in counts])
  rows = counts.sum((1, 2))
  return Simulated(
    seconds,
    bound,
    ratio,
    cost_model.achieved(cluster.topology, sizes, rows, seconds),
    number,
    counts.shape[1],
    largest,
    largest > shadowing.least_rows(np.maximum(number, 1), sizes),
  )


def _shadowed(
  rule: str, cluster: Cluster, counts: Int[np.ndarray, 'R E W'], sizes: Sizes
) -> Bool[np.ndarray, 'R E']:
  """The experts that a rule shadows."""
  shadowed = np.zeros(counts.shape[:2], bool)
  if rule == BEST:
    for i in range(0, len(counts), _AT_ONCE):
      part = slice(i, i + _AT_ONCE)
      shadowed[part] = _best(cluster, counts[part], sizes)
  elif rule:
    choose, speeds = RULES[rule].choose, cluster.speeds(sizes)
    for mask, one in zip(shadowed, counts, strict=True):
      mask[[*choose(one, sizes, speeds).experts]] = True
  return shadowed


def _best(
  cluster: Cluster, counts: Int[np.ndarray, 'R E W'], sizes: Sizes
) -> Bool[np.ndarray, 'R E']:
  """The most popular experts, up to half of them, that save most seconds."""
  order = np.argsort(-counts.sum(-1), axis=-1, kind='stable')
  rank = np.argsort(order, axis=-1)  # each expert's, by popularity
  seconds = [
    schedule_model.step(
      cluster.topology, counts, sizes, shadowed=rank < r
    ).sequential
    for r in range(counts.shape[1] // 2 + 1)
  ]
  return rank < np.argmin(seconds, 0)[:, None]


def _steps(arm, cluster, counts, shadowed, sizes) -> tuple[np.ndarray, ...]:
  """Seconds, their bound, and computation over communication."""
  one = schedule_model.step(cluster.topology, counts, sizes, shadowed=shadowed)
  seconds = one.sequential
  if arm.scheduled:
    seconds = schedule_model.step(
      cluster.topology,
      counts,
      sizes,
      num_groups=cluster.num_groups,
      shadowed=shadowed,
    ).scheduled
  with np.errstate(divide='ignore'):
    return seconds, one.overlapped, one.comp / one.comm


def speed_up(base: Simulated, other: Simulated) -> tuple[float, float]:
  """The speed-up over all batches and layers, and that of the best of them."""
  return (
    float(base.seconds.sum() / other.seconds.sum()),
    float((base.seconds / other.seconds).max()),
  )


def bound_share(simulated: Simulated) -> float:
  """The seconds that nothing can beat, as a share of the seconds."""
  return float(simulated.bound.sum() / simulated.seconds.sum())


def check_bound(simulated: Mapping[str, Simulated]) -> None:
  """Checks that no arm is faster than if all overlapped.

  Raises:
    ValueError: One is, so that the simulation is wrong.
  """
  for name, arm in simulated.items():
    if (arm.seconds < arm.bound * (1 - 1e-9)).any():
      raise InputError(f'{name!r} is faster than its bound of overlap')


def even_points(
  cluster: Cluster, sizes: Sizes
) -> tuple[Float[np.ndarray, ' N'], Float[np.ndarray, ' N']]:
  """Synchronous layers of even rows and many hidden widths on the roofline.

  Returns:
    Computation over communication, and FLOPs per second of a device.
  """
  W = cluster.num_devices
  ratios, flops = [], []
  for factor in 2.0 ** np.arange(-3, 7):
    wide = sizes._replace(F=max(int(sizes.F * factor), 1))
    latency = cost_model.latency(cluster.topology, np.full((W, W), 64), wide)
    ratios.append(latency.ratio)
    flops.append(
      cost_model.achieved(
        cluster.topology, wide, latency.rows, latency.synchronous
      )
    )
  return np.array(ratios), np.array(flops)
