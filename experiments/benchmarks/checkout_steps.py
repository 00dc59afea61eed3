"""Training steps for `bench_train_step --against`, which `turns.py` runs.

They are run with the modules of other checkouts, so this file imports few
names, and none that is new.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.benchmarks.train_step_programs import prepared, random_batch
from moe_jax.cli import load_config
from moe_jax.devices import keep_freed_memory
from moe_jax.training.programs import make_programs


def programs(
  config: str, cases: Mapping[str, Any]
) -> dict[str, Callable[[], str]]:
  """Functions that take a step and return its loss, all digits in hexadecimal.

  Each has a state of its own.

  Args:
    config: File of the config.
    cases: Overrides of the config's `model`, by name of the case.
  """
  keep_freed_memory()
  loaded = load_config(config)
  return {case: _step(prepared(loaded, o)) for case, o in cases.items()}


def _step(options):
  mesh = options.mesh.make(jax.devices()[:1])
  compiled = make_programs(options, options.build(), mesh)
  batch = compiled.put(random_batch(options))
  state = compiled.init_state()
  step = compiled.train_step.lower(compiled.abstract_state, batch).compile()

  def take():
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return float(metrics.loss).hex()

  return take
