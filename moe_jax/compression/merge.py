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
  SmallerLayer,
  smaller,
)
from moe_jax.compression.fewer_command import (
  add_arguments,
  closing_lines,
  read,
  report_lines,
  write,
)
from moe_jax.compression.usage import Usage
from moe_jax.models.expert_arrays import COLUMN, Arrays, SparseLayer

TIED = 'tied'
ROUTERS = (TIED, SHRUNK)


def merged(
  layer: SparseLayer, usage: Usage, groups: grouping.Groups
) -> SmallerLayer:
  """A layer whose groups of experts are one expert each.

  A group of one keeps its bits. Column g of a router that shrinks is the mean
  of its group's columns, weighted like the experts, and so is its balancing
  bias: the bias of an expert that is hardly used has risen for long, and a
  plain mean would give it to the whole group.

  Args:
    layer: The layer.
    usage: The statistics of its experts.
    groups: The experts of each group; expert g is made of group g.
  """
  weights = [_weights(usage, group) for group in groups]
  experts = {path: np.asarray(x) for path, x in layer.experts.items()}
  mean_experts = [
    _mean_expert(experts, usage, group, group_weights, layer)
    for group, group_weights in zip(groups, weights, strict=True)
  ]
  columns = {}
  for path, x in layer.columns.items():
    axis = layer.axes[path].index(COLUMN)
    mean_columns = [
      _mean(np.take(np.asarray(x), group, axis), group_weights, axis)
      for group, group_weights in zip(groups, weights, strict=True)
    ]
    columns[path] = jnp.asarray(np.stack(mean_columns, axis))
  row, share = np.zeros(layer.moe.num_experts, int), [0.0] * len(usage.choices)
  for g, group in enumerate(groups):
    row[list(group)] = g
    for expert, weight in zip(group, weights[g], strict=True):
      share[expert] = float(weight)
  return SmallerLayer(
    {path: jnp.stack([x[path] for x in mean_experts]) for path in experts},
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
  aligned_experts = []
  for e in group:
    expert = of_expert(experts, e)
    order = permutation(reference, expert, axes)
    aligned_experts.append(permuted(expert, order, axes))
  return {
    path: _mean(np.stack([x[path] for x in aligned_experts]), weights, 0)
    for path in experts
  }


def _mean(arrays: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
  """The weighted mean along an axis, by float64, in the dtype of the arrays."""
  if len(weights) == 1:
    return np.take(arrays, 0, axis)
  wide = np.moveaxis(arrays, axis, -1).astype(np.float64)
  return (wide @ weights).astype(arrays.dtype)


def merge(
  original: Calibrated,
  counts: Mapping[int, int],
  *,
  group_by: str = 'outputs',
  rule: str = 'clusters',
) -> dict[int, SmallerLayer]:
  """The layers of a run with groups of experts merged, by number.

  Args:
    original: The run with the statistics of its experts.
    counts: The number of experts that stay in each sparse layer.
    group_by: One of `grouping.SIMILARITIES`.
    rule: One of `grouping.GROUPINGS`.
  """
  group_experts, new_layers = grouping.GROUPINGS[rule], {}
  for n, layer in original.layers.items():
    usage = original.usage[n]
    distance = grouping.distances(layer, usage, group_by)
    groups = group_experts(distance, usage, counts[n])
    new_layers[n] = merged(layer, usage, groups)
  return new_layers


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
  original, counts = read(options, overrides, 'usage')
  new_layers = merge(
    original, counts, group_by=options.group_by, rule=options.grouping
  )
  model, variables = smaller(original.run, new_layers, options.router)
  folder = write(original, options.output, model, variables)
  groups = [
    f'layer {n}: {_groups_text(layer)}' for n, layer in new_layers.items()
  ]
  lines = report_lines(
    original, variables['params'], new_layers, options.router
  )
  lines += ['groups of experts: ' + '; '.join(groups)]
  return '\n'.join([*lines, closing_lines(folder, original)])


def _groups_text(layer: SmallerLayer) -> str:
  row = np.array(layer.row)
  return ' '.join(
    '+'.join(map(str, np.flatnonzero(row == g)))
    for g in range(layer.num_experts)
  )
