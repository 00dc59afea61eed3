"""Parts that merging and pruning share: numbers, and the smaller model.

Routers keep their E columns, each of which leads to an expert that is left or
to none, or they shrink to a column for each. Not here: which experts are left
(`merge.py`, `prune.py`).
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


class Fewer(NamedTuple):
  """A sparse layer with the experts that are left of it.

  Attributes:
    experts: The parameters of these experts, [E', ...].
    columns: The router's parameters with a column for each of them.
    row: The expert of each of the E old columns, or `MASKED`.
    share: The weight of each old column in the mean that `columns` has; () if
      it has old columns as they were.
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
    kept = np.flatnonzero(row >= 0)
    mix[row[kept], kept] = np.array(self.share)[kept] if self.share else 1.0
    return mix


class Calibrated(NamedTuple):
  """A run with its sparse layers and their statistics on some data.

  Attributes:
    run: The run.
    layers: Its sparse layers, by number.
    usage: The statistics of each of them.
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
    options: Other data; None is that of the run.

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
  said = f'layer {layer.number}: {type(router).__name__}'
  if not router.has_columns:
    raise ValueError(
      f'{said} has no column for each expert, by which its tokens would choose '
      'among those that are left'
    )
  if layer.moe.retained.rows:
    raise ValueError(
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
        raise ValueError(
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
  parts = [part.strip() for part in text.split(',')]
  if not all(part.isdigit() for part in parts):
    raise ValueError(f"experts={text!r} is neither a number nor '4,6,4'")
  if len(parts) not in (1, len(layers)):
    raise ValueError(
      f'experts={text!r} has {len(parts)} numbers, and the model has the '
      f'sparse layers {list(layers)}; give one number, or one for each'
    )
  counts = [int(part) for part in parts] * (
    len(layers) if len(parts) == 1 else 1
  )
  found = dict(zip(layers, counts, strict=True))
  for number, count in found.items():
    moe = layers[number].moe
    if not moe.num_selected <= count <= moe.num_experts:
      raise ValueError(
        f'experts={text!r}: {count} in layer {number} is not in '
        f'[num_selected={moe.num_selected}, num_experts={moe.num_experts}]'
      )
  return found


def smaller(
  run: WholeRun, left: Mapping[int, Fewer], router: str
) -> tuple[ModelOptions, dict[str, Any]]:
  """The options and the variables of the model with the experts that are left.

  A balancing bias goes with its column.

  Args:
    run: The run.
    left: Each sparse layer with the experts that stay, by number.
    router: 'shrunk' makes columns as few as experts; otherwise routers keep
      all of theirs.
  """
  model, params = run.model, run.variables['params']
  layers = sparse_layers(model, params)

  def change(first: int, half: LayerOptions) -> MoeOptions:
    own = {
      layers[n].in_stack: fewer
      for n, fewer in left.items()
      if first <= n < first + half.num_layers
    }
    if not own:
      return half.moe
    if router == SHRUNK:
      counts = {i: fewer.num_experts for i, fewer in own.items()}
      E = max(counts.values())
      lost = retained({i: count for i, count in counts.items() if count < E})
      return dataclasses.replace(half.moe, num_experts=E, retained=lost)
    rows = {i: f.row for i, f in own.items() if f.num_experts < len(f.row)}
    lost = retained(half.moe.retained.counts, rows)
    return dataclasses.replace(half.moe, retained=lost)

  options = with_moes(run.options.model, change)
  changes = {
    n: {**fewer.experts, **(fewer.columns if router == SHRUNK else {})}
    for n, fewer in left.items()
    if fewer.num_experts < layers[n].moe.num_experts
  }
  new = options.build(run.options.sharding.rules)
  mixes = {n: left[n].mix for n in changes if router == SHRUNK}
  state = run.variables.get(COLLECTION, {})
  return options, as_variables(
    assembled(model, params, new, changes),
    assembled_state(model, state, new, mixes),
  )


def only(layer: SparseLayer, experts: list[int]) -> Fewer:
  """The layer with these experts alone, the columns of others masked."""
  row = np.full(layer.moe.num_experts, MASKED)
  row[experts] = np.arange(len(experts))
  index = np.array(experts)
  return Fewer(
    {path: x[index] for path, x in layer.experts.items()},
    layer.selected_columns(index),
    tuple(row.tolist()),
  )


def without(run: WholeRun, lost: Mapping[int, Collection[int]]) -> WholeRun:
  """The run in memory without some experts, whose columns are never chosen.

  A token that would choose one of them takes the next of its choices.

  Args:
    run: The run.
    lost: The experts that are lost, by the number of the layer.

  Raises:
    ValueError: A layer is not sparse, has no such expert or would keep fewer
      than a token chooses, or as `check_layer`.
  """
  layers = sparse_layers(run.model, run.variables['params'])
  left = {}
  for number, experts in lost.items():
    if number not in layers:
      raise ValueError(f'layer {number} is not sparse; {[*layers]} are')
    layer, gone = layers[number], set(experts)
    check_layer(layer)
    E, K = layer.moe.num_experts, layer.moe.num_selected
    kept = [e for e in range(E) if e not in gone]
    if wrong := sorted(gone - set(range(E))):
      raise ValueError(f'layer {number} has no experts {wrong}, only {E}')
    if len(kept) < K:
      raise ValueError(
        f'layer {number} would keep {len(kept)} experts, and a token chooses '
        f'num_selected={K}'
      )
    left[number] = only(layer, kept)
  options, variables = smaller(run, left, 'masked')
  return run._replace(
    options=run.options._replace(model=options),
    model=options.build(run.options.sharding.rules),
    variables=variables,
  )
