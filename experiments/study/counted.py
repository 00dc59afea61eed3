"""Costs of arms that a study states before any run, counted from their configs.

Not here: the counting (`moe_jax.analysis`), and measured times (`times.py`).
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.study.jobs import layered
from moe_jax import run_config
from moe_jax.analysis import cost
from moe_jax.run_config import RunConfig


def training_flops(
  config: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> int:
  """FLOPs of a training step for a token; see `cost.Cost.training_flops`.

  Args:
    config: The config that the arms of a study share.
    overrides: What an arm changes in it, by dotted name.

  Raises:
    ValueError: The overrides do not fit, or the model reads no tokens.
  """
  options = run_config.read(layered(RunConfig, config, overrides))
  options = cost.with_own_vocabulary(options)
  lengths = options.data.seq_len, options.data.target_len
  return cost.count(options.build(), *lengths).training_flops
