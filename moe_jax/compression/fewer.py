"""Steps that merging and pruning share: numbers of experts, the smaller model.

Routers keep their E columns, each of which leads to an expert that is left or
to none, or they shrink to a column for each expert that is left.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from moe_jax.compression import calibration
from moe_jax.compression.usage import Usage, measure
from moe_jax.compression.whole_run import WholeRun
from moe_jax.data import DataOptions
from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.retained import retained
from moe_jax.layers.routers.sizes import MASKED
from moe_jax.models import ModelOptions, code_trees
from moe_jax.models.expert_arrays import (
  Arrays,
  SparseLayer,
  assembled,
  assembled_state,
  sparse_layers,
  with_moes,
)
from moe_jax.models.router_state import COLLECTION
from moe_jax.models.router_state import variables as as_variables
from moe_jax.models.text_options import LayerOptions

SHRUNK = 'shrunk'


class SmallerLayer(NamedTuple):
  """A sparse layer with the experts that are left of it.

  Attributes:
    experts: The parameters of these experts, [E', ...].
    columns: The router's parameters with a column for each of these experts.
    row: The expert of each of the E old columns, or `MASKED`.
    share: The weight of each old column in the mean that `columns` has; () if
      `columns` has old columns as they were.
  """

  experts: Arrays
  columns: Arrays
  row: tuple[int, ...]
  share: tuple[float, ...] = ()

  @property
  def num_experts(self) -> int:
    """E', the number of experts that are left."""
    return max(self.row) + 1

  @property
  def mix(self) -> Float[np.ndarray, 'N E']:
    """The weights of the E old columns in each of the N = E' new ones."""
    row, mix = np.array(self.row), np.zeros((self.num_experts, len(self.row)))
    index = np.flatnonzero(row >= 0)  # of columns that lead to an expert
    mix[row[index], index] = np.array(self.share)[index] if self.share else 1.0
    return mix


def regrouped(layer: SparseLayer, new_layer: SmallerLayer) -> list[int]:
  """The experts whose columns are in another group where a router shrinks.

  Groups are as many consecutive columns each, before and after.

  Args:
    layer: The layer.
    new_layer: The layer with the experts that are left.
  """
  num_groups = getattr(layer.moe.router, 'expert_groups', 1)
  sizes = [n // num_groups for n in (len(new_layer.row), new_layer.num_experts)]
  return [
    expert
    for expert, index in enumerate(new_layer.row)
    if index >= 0 and expert // sizes[0] != index // sizes[1]
  ]


class Calibrated(NamedTuple):
  """A run with its sparse layers and their statistics on some data.

  Attributes:
    run: The run.
    layers: Its sparse layers, by number.
    usage: The statistics of each sparse layer.
    batches: The batches of the data.
  """

  run: WholeRun
  layers: dict[int, SparseLayer]
  usage: dict[int, Usage]
  batches: list[dict[str, Any]]


def calibrated(
  run: WholeRun, num_batches: int, options: DataOptions | None = None
) -> Calibrated:
  """Measures the experts of a run on batches of its training data.

  Args:
    run: The run.
    num_batches: The number of batches.
    options: The options of other data; None takes those of the run.

  Raises:
    ValueError: The model's experts cannot be merged or pruned, or as
      `calibration.batches`.
  """
  code_trees.check_plain(run.options.model, run.folder)
  layers = sparse_layers(run.model, run.variables['params'])
  for layer in layers.values():
    check_layer(layer)
  batches = calibration.batches(run, num_batches, options)
  usage = measure(run.model, run.variables, batches)
  return Calibrated(run, layers, usage, batches)


def check_layer(layer: SparseLayer) -> None:
  """Raises ValueError where experts of a layer cannot be merged or pruned."""
  router = layer.moe.router
  label = f'layer {layer.number}: {type(router).__name__}'
  if not router.has_columns:
    raise InputError(
      f'{label} has no column for each expert, by which its tokens would '
      'choose among those that are left'
    )
  if layer.moe.retained.rows:
    raise InputError(
      f'layer {layer.number} has tied columns already; begin with the run that '
      'it was made of'
    )


def check_columns(run: WholeRun, counts: Mapping[int, int]) -> None:
  """Checks that routers can keep the columns of experts that are lost.

  Args:
    run: The run.
    counts: The number of experts that stay, by layer; a layer without one is
      taken to lose some.

  Raises:
    ValueError: A layer would lose experts whose router has fewer columns than
      those of other layers already.
  """
  first = 0
  for _, stack in run.model.stacks:
    if (moe := stack.experts) is None:
      first += len(stack.sparse)
      continue
    for layer, count in moe.retained.counts.items():
      if counts.get(first + layer, 0) < count:
        raise InputError(
          f'layer {first + layer} has {count} columns and other layers have '
          f'{moe.num_experts}, so that its router cannot keep those '
          f'of experts that it loses: use --router={SHRUNK}, or keep all its '
          'experts by --experts'
        )
    first += len(stack.sparse)


def numbers(text: str, layers: Mapping[int, SparseLayer]) -> dict[int, int]:
  """The number of experts that stay in each sparse layer.

  Args:
    text: One number for all, '4', or one for each in their order: '4,6,4'.
    layers: The sparse layers.

  Raises:
    ValueError: The text is neither, or a number is not in [K, E].
  """
  entries = [entry.strip() for entry in text.split(',')]
  if not all(entry.isdigit() for entry in entries):
    raise InputError(f"experts={text!r} is neither a number nor '4,6,4'")
  if len(entries) not in (1, len(layers)):
    raise InputError(
      f'experts={text!r} has {len(entries)} numbers, and the model has the '
      f'sparse layers {list(layers)}; give one number, or one for each'
    )
  counts = [int(entry) for entry in entries] * (
    len(layers) if len(entries) == 1 else 1
  )
  counts_by_layer = dict(zip(layers, counts, strict=True))
  for number, count in counts_by_layer.items():
    moe = layers[number].moe
    if not moe.num_selected <= count <= moe.num_experts:
      raise InputError(
        f'experts={text!r}: {count} in layer {number} is not in '
        f'[num_selected={moe.num_selected}, num_experts={moe.num_experts}]'
      )
  return counts_by_layer


def smaller(
  run: WholeRun, new_layers: Mapping[int, SmallerLayer], router: str
) -> tuple[ModelOptions, dict[str, Any]]:
  """The options and the variables of the model with the experts that are left.

  A balancing bias goes with its column.

  Args:
    run: The run.
    new_layers: Each sparse layer with the experts that stay, by number.
    router: 'shrunk' makes columns as few as experts; otherwise routers keep
      all of their columns.
  """
  model, params = run.model, run.variables['params']
  layers = sparse_layers(model, params)

  def change(first: int, half: LayerOptions) -> MoeOptions:
    by_index = {
      layers[n].in_stack: new_layer
      for n, new_layer in new_layers.items()
      if first <= n < first + half.num_layers
    }
    if not by_index:
      return half.moe
    if router == SHRUNK:
      counts = {i: x.num_experts for i, x in by_index.items()}
      E = max(counts.values())
      retention = retained({i: n for i, n in counts.items() if n < E})
      return dataclasses.replace(half.moe, num_experts=E, retained=retention)
    rows = {i: x.row for i, x in by_index.items() if x.num_experts < len(x.row)}
    retention = retained(half.moe.retained.counts, rows)
    return dataclasses.replace(half.moe, retained=retention)

  options = with_moes(run.options.model, change)
  changed_arrays = {
    n: {**new_layer.experts, **(new_layer.columns if router == SHRUNK else {})}
    for n, new_layer in new_layers.items()
    if new_layer.num_experts < layers[n].moe.num_experts
  }
  new_model = options.build(run.options.sharding.rules)
  mixes = {n: new_layers[n].mix for n in changed_arrays if router == SHRUNK}
  state = run.variables.get(COLLECTION, {})
  return options, as_variables(
    assembled(model, params, new_model, changed_arrays),
    assembled_state(model, state, new_model, mixes),
  )


def only(layer: SparseLayer, experts: list[int]) -> SmallerLayer:
  """The layer with these experts alone, the columns of others masked."""
  row = np.full(layer.moe.num_experts, MASKED)
  row[experts] = np.arange(len(experts))
  index = np.array(experts)
  return SmallerLayer(
    {path: x[index] for path, x in layer.experts.items()},
    layer.selected_columns(index),
    tuple(row.tolist()),
  )


def without(run: WholeRun, lost: Mapping[int, Collection[int]]) -> WholeRun:
  """The run in memory without some experts, whose columns are never chosen.

  A token that would choose one of them takes the next of its choices.

  Args:
    run: The run.
    lost: The experts to remove, by the number of their layer.

  Raises:
    ValueError: A layer is not sparse, has no such expert or would keep fewer
      than a token chooses, or as `check_layer`.
  """
  layers = sparse_layers(run.model, run.variables['params'])
  new_layers = {}
  for number, lost_experts in lost.items():
    if number not in layers:
      raise InputError(f'layer {number} is not sparse; {[*layers]} are')
    layer, lost_experts = layers[number], set(lost_experts)
    check_layer(layer)
    E, K = layer.moe.num_experts, layer.moe.num_selected
    remaining = [e for e in range(E) if e not in lost_experts]
    if unknown := sorted(lost_experts - set(range(E))):
      raise InputError(f'layer {number} has no experts {unknown}, only {E}')
    if len(remaining) < K:
      raise InputError(
        f'layer {number} would keep {len(remaining)} experts, and a token '
        f'chooses num_selected={K}'
      )
    new_layers[number] = only(layer, remaining)
  options, variables = smaller(run, new_layers, 'masked')
  return run._replace(
    options=run.options._replace(model=options),
    model=options.build(run.options.sharding.rules),
    variables=variables,
  )
