"""Rows that experts multiply, and choices that are dropped, of a real routing.

Dropless experts multiply the rows that they are given, filled up to whole
blocks of a kernel (https://arxiv.org/abs/2211.15841); experts with slots
multiply all of them, empty or not. A load has the number of choices of each
expert.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.study import validation_routing
from moe_jax.analysis.routing_measures import expert_counts
from moe_jax.analysis.traces import Record
from moe_jax.shapes import Int
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

BLOCKS, FACTORS = (8, 32, 128), (1, 1.5, 2)
FULLEST = 'slots of the fullest'
# Ways of serving a routing, by the part of the metrics' names for each.
WAYS = {
  **{f'blocks_{block}': f'blocks of {block}' for block in BLOCKS},
  'fullest': FULLEST,
  **{f'slots_{factor}': f'{factor} slots a choice' for factor in FACTORS},
}


def loads(
  records: Sequence[Record], layer: int, num_experts: int
) -> Iterator[Int[np.ndarray, ' E']]:
  """The load of a layer in each batch, before any choice is dropped."""
  for record in records:
    real = record.documents > 0
    yield expert_counts(record.layers[layer].expert[real], num_experts)


def in_blocks(load: Int[np.ndarray, ' E'], block: int) -> float:
  """Rows for each choice, if every expert's are a multiple of `block`."""
  return float((-(-load // block) * block).sum() / load.sum())


def dropped(load: Int[np.ndarray, ' E'], slots: int) -> float:
  """Share of choices for which an expert of so many slots has no room."""
  return float(np.maximum(load - slots, 0).sum() / load.sum())


def rows_and_drops(
  load: Int[np.ndarray, ' E'],
) -> dict[str, tuple[float, float]]:
  """Rows for each choice, and the share that is dropped, by way of serving."""
  mean = load.sum() / len(load)
  slots = {factor: int(np.ceil(factor * mean)) for factor in FACTORS}
  return {
    **{f'blocks_{b}': (in_blocks(load, b), 0.0) for b in BLOCKS},
    'fullest': (float(load.max() / mean), 0.0),
    **{f'slots_{f}': (n / mean, dropped(load, n)) for f, n in slots.items()},
  }


def measure(
  run: Run, state: TrainState, name: str, num_batches: int
) -> dict[str, float]:
  """Rows and drops of the routing of a trained model, for each way of serving.

  A group is a whole batch.

  Args:
    run: The run.
    state: Its last state.
    name: Name of an entry of `config.evals`.
    num_batches: Number of validation batches.

  Returns:
    Means over batches, `routing/layer_<i>/<way>/<what>`: rows, the number that
    is multiplied for each choice; dropped, the share of choices that would be.
  """
  records = [*validation_routing.last_records(run, state, name, num_batches)]
  numbers = {}
  for layer in run.model.stacks.sparse_layers:
    E = run.model.stacks.moe_of(layer).num_experts
    by_batch = [rows_and_drops(load) for load in loads(records, layer, E)]
    for way in WAYS:
      rows, lost = np.mean([shares[way] for shares in by_batch], 0)
      key = f'routing/layer_{layer}/{way}'
      numbers |= {f'{key}/rows': float(rows), f'{key}/dropped': float(lost)}
  return numbers
