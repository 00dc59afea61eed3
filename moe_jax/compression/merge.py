"""Merging of similar experts: each group of a layer becomes one expert.

    python -m moe_jax.compression merge --run=runs/tiny --output=runs/half \
      --experts=4 --group_by=outputs --router=tied --batches=8

M-SMoE (https://arxiv.org/abs/2310.01334) and HC-SMoE
(https://arxiv.org/abs/2410.08589) are settings of it: the similarity, the rule
of grouping, and the number of experts of each layer. A group is the mean of its
experts, aligned to the most used of them and weighted by usage. An expert that
no calibration token reaches has the weight 0 in its group; a group of such
experts alone is their even mean. Recovery is training afterwards: distillation
with the original run as the teacher.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax import command_line
from moe_jax.compression import grouping
from moe_jax.compression.align import of_expert, permutation, permuted
from moe_jax.compression.fewer import (
  SHRUNK,
  Calibrated,
  Fewer,
  smaller,
)
from moe_jax.compression.fewer_command import (
  add_arguments,
  described,
  read,
  write,
  written_to,
)
from moe_jax.compression.usage import Usage
from moe_jax.models.expert_arrays import COLUMN, Arrays, SparseLayer

TIED = 'tied'
ROUTERS = (TIED, SHRUNK)


def merged(layer: SparseLayer, usage: Usage, groups: grouping.Groups) -> Fewer:
  """A layer whose groups of experts are one expert each.

  A group of one keeps its bits. Column g of a router that shrinks is the mean
  of its group's, weighted like the experts, and so is its balancing bias: an
  expert that is hardly used has one that has risen for long, which a plain mean
  would give to the whole group.

  Args:
    layer: The layer.
    usage: The statistics of its experts.
    groups: The experts of each group; expert g is made of group g.
  """
  weights = [_weights(usage, group) for group in groups]
  experts = {path: np.asarray(x) for path, x in layer.experts.items()}
  each = [
    _mean_expert(experts, usage, group, own, layer)
    for group, own in zip(groups, weights, strict=True)
  ]
  columns = {}
  for path, x in layer.columns.items():
    axis = layer.axes[path].index(COLUMN)
    parts = [
      _mean(np.take(np.asarray(x), group, axis), own, axis)
      for group, own in zip(groups, weights, strict=True)
    ]
    columns[path] = jnp.asarray(np.stack(parts, axis))
  row, share = np.zeros(layer.moe.num_experts, int), [0.0] * len(usage.choices)
  for g, group in enumerate(groups):
    row[list(group)] = g
    for expert, weight in zip(group, weights[g], strict=True):
      share[expert] = float(weight)
  return Fewer(
    {path: jnp.stack([own[path] for own in each]) for path in experts},
    columns,
    tuple(row.tolist()),
    tuple(share),
  )


def _weights(usage: Usage, group: tuple[int, ...]) -> np.ndarray:
  """The weight of each expert of a group; they sum to 1."""
  choices = usage.choices[list(group)]
  if not choices.sum():
    choices = np.ones(len(group))
  return choices / choices.sum()


def _mean_expert(
  experts: Mapping[Any, np.ndarray],
  usage: Usage,
  group: tuple[int, ...],
  weights: np.ndarray,
  layer: SparseLayer,
) -> Arrays:
  if len(group) == 1:
    return of_expert(experts, group[0])
  axes = {path: layer.axes[path][1:] for path in experts}
  reference = of_expert(experts, group[int(np.argmax(weights))])
  every = []
  for e in group:
    expert = of_expert(experts, e)
    order = permutation(reference, expert, axes)
    every.append(permuted(expert, order, axes))
  return {
    path: _mean(np.stack([own[path] for own in every]), weights, 0)
    for path in experts
  }


def _mean(arrays: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
  """The weighted mean along an axis, in float64, of the arrays' own type."""
  if len(weights) == 1:
    return np.take(arrays, 0, axis)
  wide = np.moveaxis(arrays, axis, -1).astype(np.float64)
  return (wide @ weights).astype(arrays.dtype)


def merge(
  before: Calibrated,
  counts: Mapping[int, int],
  *,
  group_by: str = 'outputs',
  rule: str = 'clusters',
) -> dict[int, Fewer]:
  """The layers of a run with groups of experts merged, by number.

  Args:
    before: The run, measured.
    counts: The number of experts that stay in each sparse layer.
    group_by: One of `grouping.SIMILARITIES`.
    rule: One of `grouping.GROUPINGS`.
  """
  grouped, left = grouping.GROUPINGS[rule], {}
  for n, layer in before.layers.items():
    usage = before.usage[n]
    distance = grouping.distances(layer, usage, group_by)
    left[n] = merged(layer, usage, grouped(distance, usage, counts[n]))
  return left


def add(commands: Any) -> None:
  """Adds the command to a parser's commands."""
  parser = commands.add_parser(
    'merge', help='merges similar experts', **command_line.about(__doc__)
  )
  parser.set_defaults(run=_run)
  add_arguments(parser, ROUTERS, TIED)
  meanings = '; '.join(
    f'{name}: {similarity.meaning}'
    for name, similarity in grouping.SIMILARITIES.items()
  )
  parser.add_argument(
    '--group_by',
    choices=[*grouping.SIMILARITIES],
    default='outputs',
    help=f'what experts are compared by: {meanings}',
  )
  parser.add_argument(
    '--grouping',
    choices=[*grouping.GROUPINGS],
    default='clusters',
    help='clusters of average linkage, or the most used experts as cores that '
    'the others join (M-SMoE)',
  )


def _run(options: argparse.Namespace, overrides: list[str]) -> str:
  before, counts = read(options, overrides, 'usage')
  left = merge(before, counts, group_by=options.group_by, rule=options.grouping)
  model, variables = smaller(before.run, left, options.router)
  folder = write(before, options.output, model, variables)
  groups = [f'layer {n}: {_groups(fewer)}' for n, fewer in left.items()]
  lines = described(before, variables['params'], left)
  lines += ['groups of experts: ' + '; '.join(groups)]
  return '\n'.join([*lines, written_to(folder, before)])


def _groups(fewer: Fewer) -> str:
  row = np.array(fewer.row)
  return ' '.join(
    '+'.join(map(str, np.flatnonzero(row == g)))
    for g in range(fewer.num_experts)
  )
