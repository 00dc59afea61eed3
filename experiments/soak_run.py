"""What `soak.py` disturbs: one process of a small run, with a witness.

    python -m experiments.soak_run WORKDIR JSON [HOST:PORT PROCESSES ID]

The witness writes what the run does to `witness.jsonl`, a line at a time, so
that a kill loses at most the last one. JSON holds `seed`, `total_steps`,
`mesh` and `gradients`.
"""

import functools
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from configs import base
from moe_jax import distributed
from moe_jax.config import merge
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.losses import normalizers
from moe_jax.training.manifest import name as path_name
from moe_jax.training.setup import Hook, Run, loss_weights
from moe_jax.training.step import make_grad_fn

WITNESS = 'witness.jsonl'
EVAL = 'train_capacity'
SAVE_EVERY = 20


def make_config(
  seed: int, total_steps: int, mesh: Mapping[str, int]
) -> ml_collections.ConfigDict:
  """A sparse model small enough that a step takes milliseconds."""
  config = base.get_config()
  config.evals = {EVAL: base.evaluation(every_steps=0)}
  config.checkpoint.keep_best = False
  config.checkpoint.keep_newest = 3
  config.checkpoint.every_steps = SAVE_EVERY
  config.distributed.heartbeat_timeout_seconds = 10
  config.distributed.stall_timeout_seconds = 120
  changes = dict(
    seed=seed,
    total_steps=total_steps,
    batch_size=8,
    log_every_steps=SAVE_EVERY,
    data=dict(seq_len=32, source='python_stdlib:email,json,asyncio,unittest'),
    model=dict(num_layers=2, width=32, num_heads=2, num_kv_heads=2, hidden=64),
    optimizer=dict(learning_rate=3e-3, warmup_steps=10),
    mesh=dict(mesh),
    sample=dict(num_tokens=0),
  )
  moe = dict(num_experts=4, num_selected=2, gates='renormalized', jitter=0.01)
  changes['model']['moe'] = {**moe, 'balance_bias_rate': 1e-3}
  return merge(config, changes)


class Witness(Hook):
  """Writes down what the run begins with, and every batch it takes."""

  def __init__(self, gradients: bool):
    """Whether the first step's loss and gradient are kept too."""
    self._gradients = gradients

  def start(self, run: Run) -> None:
    """Wraps the step."""
    step_of, self._run = run.train_step, run
    self._seen = False

    def step(state, batch):
      number = int(state.step) + 1
      if not self._seen:
        self._begin(state, batch, number)
        self._seen = True
      self._write({'step': number, 'batch': digest(batch)})
      return step_of(state, batch)

    run.train_step = step

  def end(self, run: Run, state: Any) -> None:
    """Writes the last state's digests."""
    self._write({'end': int(state.step), 'arrays': digests(state)})

  def _begin(self, state, batch, number) -> None:
    run = self._run
    line = {
      'begin': number,
      'mesh': dict(run.mesh.shape),
      'processes': jax.process_count(),
      'arrays': digests(state),
    }
    if self._gradients:
      found = distributed.fetch(first_gradient(run, state, batch))
      if distributed.is_first():
        np.savez(run.workdir / f'gradient_{number}.npz', **named(found))
    self._write(line)

  def _write(self, line: dict[str, Any]) -> None:
    if not distributed.is_first():
      return
    with (self._run.workdir / WITNESS).open('a') as file:
      file.write(json.dumps({**line, 'time': time.time()}) + '\n')


def first_gradient(run: Run, state: Any, batch: Any) -> dict[str, Any]:
  """Loss and gradient of a step, on the run's mesh."""
  grad_fn = make_grad_fn(run.model, loss_weights(run.config, run.model))

  @functools.partial(
    jax.jit,
    out_shardings=(
      None,
      jax.tree.map(lambda leaf: leaf.sharding, state.params),
    ),
  )
  def compute(state, batch):
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    whole = normalizers(batch)
    (loss, _), grads = grad_fn(
      state.params, batch, whole, key, state.router_state
    )
    return loss, grads

  loss, grads = compute(state, batch)
  return {'loss': loss, 'grads': grads}


def named(tree: Any) -> dict[str, np.ndarray]:
  """The leaves by path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def digests(tree: Any) -> dict[str, str]:
  """The sha256 of every array, whole; all processes call this."""
  return {
    path: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    for path, leaf in named(distributed.fetch(tree)).items()
  }


def digest(batch: Any) -> str:
  """Of a global batch."""
  return hashlib.sha256(json.dumps(digests(batch)).encode()).hexdigest()


def main(workdir: str, given: str, *where: str) -> None:
  """Trains to the end, or until something happens."""
  spec = json.loads(given)
  gradients = spec.pop('gradients')
  config = make_config(**spec)
  cache = pathlib.Path(workdir).parent / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  processes = (where[0], int(where[1]), int(where[2])) if where else ()
  with distributed.joined(config.distributed, *processes):
    train_and_evaluate(config, workdir, hooks=[Witness(gradients)], resume=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
