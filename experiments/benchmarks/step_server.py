"""Takes training steps of one checkout on request, for `checkouts.py`.

    PYTHONPATH=CHECKOUT python -P experiments/benchmarks/step_server.py

The first line of the input is JSON: a config's file and the overrides of its
model by case. Each further line names a case, of which a step is taken; its
loss is written. This file is run with the modules of other checkouts, so it
imports few names, and none that is new.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmarks.train_step_programs import prepared, random_batch
from moe_jax.training.programs import make_programs


class Case:
  """A training step with its own state, compiled at once."""

  def __init__(self, config, overrides):
    options = prepared(config, overrides)
    mesh = options.mesh.make(jax.devices()[:1])
    programs = make_programs(options, options.build(), mesh)
    self.batch = programs.put(random_batch(options))
    self.state = programs.init_state()
    step = programs.train_step
    self.step = step.lower(programs.abstract_state, self.batch).compile()

  def take(self) -> float:
    """Takes one step; returns its loss once the new state is ready."""
    self.state, metrics = self.step(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))
    return float(metrics.loss)


def of_checkout(name: str, *modules: str) -> Callable[..., Any]:
  """A function from the first of these modules that has it; new ones first."""
  for module in modules:
    with contextlib.suppress(ImportError, AttributeError):
      return getattr(importlib.import_module(f'moe_jax.{module}'), name)
  raise ImportError(f'moe_jax has no {name} in any of {modules}')


def main() -> None:
  """Answers requests until the input ends."""
  answers, sys.stdout = sys.stdout, sys.stderr
  load_config = of_checkout('load_config', 'cli', 'config_file')
  of_checkout('keep_freed_memory', 'devices', 'memory_room', 'host')()
  request = json.loads(sys.stdin.readline())
  config = load_config(request['config'])
  cases = {name: Case(config, o) for name, o in request['cases'].items()}
  print('ready', file=answers, flush=True)
  for line in sys.stdin:
    loss = cases[json.loads(line)].take()
    print(loss.hex(), file=answers, flush=True)


if __name__ == '__main__':
  main()
