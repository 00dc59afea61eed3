"""Costs that are counted: of arms from their configs, and of runs."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.study.jobs import layered
from experiments.study.parts import Column
from moe_jax import run_config
from moe_jax.analysis import cost, counts, memory
from moe_jax.run_config import RunConfig
from moe_jax.training.setup import Run

# Columns of the numbers of `costs`.
COLUMNS = (
  Column('parameters', 'cost/params', 'k', 0, lambda x: x / 1e3),
  Column('FLOPs', 'cost/flops', 'M/byte', 2, lambda x: x / 1e6),
  Column('memory of state', 'cost/memory', 'MB', 1, lambda x: x / 1e6),
  Column(
    'memory of activations', 'cost/activations', 'MB', 1, lambda x: x / 1e6
  ),
)


def training_flops(
  config: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> int:
  """FLOPs of a training step for a token; see `cost.Cost.training_flops`.

  Args:
    config: The config that the arms of a study share.
    overrides: Values that an arm changes in the config, by dotted name.

  Raises:
    ValueError: The overrides do not fit, or the model reads no tokens.
  """
  options = run_config.read(layered(RunConfig, config, overrides))
  options = cost.with_own_vocabulary(options)
  lengths = options.data.seq_len, options.data.target_len
  return cost.count(options.build(), *lengths).training_flops


def costs(run: Run) -> dict[str, float]:
  """The costs of training a run's model.

  Returns:
    Numbers by name: cost/params; cost/flops of training for a token;
    cost/memory in bytes of weights, gradients and optimizer; cost/activations
    in bytes for a batch.
  """
  options, model = run.options, run.model
  B, T = options.batch_size, options.data.seq_len
  count = counts.count(model, T)
  trained = cost.training_cost(options, model)
  state = trained.optimizer_bytes + trained.gradient_bytes
  return {
    'cost/params': count.total_params,
    'cost/flops': count.training_flops,
    'cost/memory': state + memory.weight_bytes(model, 'float32'),
    'cost/activations': sum(memory.activations(model, B, T)),
  }
