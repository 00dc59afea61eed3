"""Tables of simulated training steps, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.faster_moe import simulate
from experiments.faster_moe.clusters import Cluster
from experiments.faster_moe.expert_counts import Counts
from experiments.faster_moe.simulate import (
  ARMS,
  SHADOWED,
  SYNCHRONOUS,
  Simulated,
)
from experiments.study import claims
from experiments.study.claims import Published
from experiments.study.tables import markdown_table
from moe_jax.parallel import shadowing
from moe_jax.parallel.cost_model import Sizes


class Case(NamedTuple):
  """Counts on a cluster, and the training steps simulated for them.

  Attributes:
    source: Name of the trace or of the drawn counts.
    cluster: The machine.
    sizes: The sizes of the simulated experts.
    counts: The rows of each device that choose each expert.
    arms: Simulated training steps, by name of the arm.
  """

  source: str
  cluster: Cluster
  sizes: Sizes
  counts: Counts
  arms: Mapping[str, Simulated]


def published(cluster: Cluster, arm: str) -> Published | None:
  """The paper's speed-up of an arm; None where no verified one is known."""
  column = ARMS[arm].published
  if not (cluster.published and column):
    return None
  cell = claims.find(f'fastermoe2022/throughput/{cluster.published}/{column}')
  return None if cell.mark == 'unverified' else cell


def _printed(cluster: Cluster, arm: str) -> str:
  """The paper's speed-up in words, with its mark; '' where it has none."""
  cell = published(cluster, arm)
  if cell is None:
    return ''
  up_to = 'up to ' if arm == SHADOWED else ''
  return f'{up_to}{cell.value:.2f}' + ' *' * (cell.mark == 'secondary')


def table(case: Case) -> str:
  """The table of all arms of a case, in Markdown."""
  base = case.arms[SYNCHRONOUS]
  F = shadowing.least_rows(1, case.sizes)
  lines = []
  for name, arm in case.arms.items():
    total, best = simulate.speed_up(base, arm)
    r = float(np.maximum(arm.shadowed, 1).mean())
    shadows = bool(ARMS[name].shadows)
    share = 100 * arm.shadowed.mean() / arm.num_experts
    lines.append(
      {
        'SIMULATED': name,
        'ms a layer': f'{1e3 * arm.seconds.mean():.2f}',
        'speed-up': f'{total:.2f}',
        'best layer and step': f'{best:.2f}',
        'paper': _printed(case.cluster, name),
        'overlap bound reached, %': f'{100 * simulate.bound_share(arm):.0f}',
        'experts shadowed, %': f'{share:.1f}' if shadows else '',
        'n_max': f'{arm.largest.mean():,.0f}',
        'r F': f'{r:.2f} x {F:,.0f} = {r * F:,.0f}',
        'n_max > r F, % of cases': f'{100 * arm.pays.mean():.0f}',
      }
    )
  return markdown_table(lines)


def heading(case: Case) -> str:
  """The size of a case in words."""
  counts, sizes = case.counts, case.sizes
  R, E, W = counts.counts.shape
  rows = counts.counts.sum() / (R * W)
  steps = len(set(counts.step.tolist()))
  layers = len(set(counts.layer.tolist()))
  return (
    f'SIMULATED, {case.source} on {case.cluster.name}: {E} experts on {W} '
    f'devices, {_number(steps, "step")} of {_number(layers, "layer")}, '
    f'{rows:,.0f} rows a device (each counted row stands for '
    f'{counts.rows:g}); M={sizes.M:,}, F={sizes.F:,}, '
    f'{sizes.kernels} kernels, {sizes.bytes_per_element} bytes an element. '
    f'{_gate(counts)}'
  )


def _number(number: int, noun: str) -> str:
  return f'{number} {noun}' + 's' * (number != 1)


def _gate(counts: Counts) -> str:
  """The share of tokens that the gate lets leave a node, in words."""
  if counts.gated is None:
    return 'No gate, for lack of nodes or of recorded logits.'
  return (
    f"The gate lets {100 * counts.outgoing:.1f} % of a device's tokens leave "
    "the node (by the paper's formula, rounded down to whole tokens)."
  )


ABOUT = """# FasterMoE, SIMULATED

Nothing here was measured on a cluster: seconds are those of a cost model on
described machines, of the experts of a layer in a training step, without
attention, optimizer and the rest of a model. The paper's speed-ups are of whole
training iterations ("*": from a secondary source). n_max is the number of rows
of the busiest device, r the number of shadowed experts (1 where there is none),
F the hidden width of an expert (3/2 of it with three kernels); where n_max >
r F, parameters are less traffic than rows. The overlap bound is
max(communication, computation) of a step.
"""


def page(
  cases: Sequence[Case], command: str, remarks: Sequence[str] = ()
) -> str:
  """The page of all cases, in Markdown.

  Args:
    cases: The cases.
    command: The command that made it.
    remarks: Sentences about the whole page.
  """
  clusters = {case.cluster.name: case.cluster.sources for case in cases}
  lines = [ABOUT, f'Made by `{command}`.', '']
  lines += [f'- {text}' for text in (*clusters.values(), *remarks)]
  for case in cases:
    lines += ['', f'## {case.source} on {case.cluster.name}', '']
    lines += [heading(case), '', table(case)]
  return '\n'.join([*lines, ''])
