"""One process of the small run that `soak.py` disturbs, with a witness.

    python -m experiments.soaking.soak_run WORKDIR JSON [HOST:PORT PROCESSES ID]

The witness of process i records the process's steps in `witness_i.jsonl`, a
line at a time, so that a kill loses at most the last line. JSON holds
`attempt`, `gradients` and arguments of `make_options`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import run_config
from moe_jax.config import merge
from moe_jax.configs import base
from moe_jax.devices import connected, fetch, is_first
from moe_jax.partitioning import path_name
from moe_jax.run_config import RunConfig
from moe_jax.training.evaluate import Measure
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.losses import loss_weights, normalizers
from moe_jax.training.setup import Hook, Run
from moe_jax.training.step import make_grad_fn

WITNESS = 'witness_*.jsonl'
EVAL = 'train_capacity'
SAVE_EVERY = 25


def make_options(
  seed: int, total_steps: int, mesh: Mapping[str, int], keep_newest: int = 3
) -> RunConfig:
  """Options of a run whose sparse model takes milliseconds for a step.

  Args:
    seed: Seed of the run.
    total_steps: Number of its steps.
    mesh: Sizes of the axes of its mesh.
    keep_newest: Number of the checkpoints that are kept.
  """
  config = base.get_config()
  config.evals = {EVAL: base.evaluation(every_steps=2 * SAVE_EVERY)}
  config.checkpoint.update(keep_best=False, keep_newest=keep_newest)
  config.checkpoint.every_steps = SAVE_EVERY
  config.distributed.heartbeat_timeout_seconds = 10
  # Seconds that processes wait for one that was killed while it started.
  config.distributed.initialization_timeout_seconds = 45
  config.distributed.stall_timeout_seconds = 120
  sources = {
    name: {'kind': 'python_stdlib', 'modules': modules}
    for name, modules in {'a': 'email,json', 'b': 'asyncio,unittest'}.items()
  }
  mixture = dict(sources=sources, rule='given', weights={'a': 2.0}, period=3)
  router = dict(gates='renormalized', jitter=0.01, balance_bias_rate=1e-3)
  moe = dict(num_experts=4, num_selected=2)
  moe['router'] = {'token_choice': {**router, 'balance_bias_scores': 'softmax'}}
  heads = dict(num_heads=2, num_kv_heads=2)
  # The ids of bytes, and as many more as two devices divide.
  model = dict(vocab_size=264, num_layers=2, width=32)
  model |= dict(attention=heads, ffn=dict(hidden=64))
  changes = dict(
    seed=seed,
    total_steps=total_steps,
    batch_size=8,
    log_every_steps=SAVE_EVERY,
    data=dict(seq_len=32, mixture=mixture),
    model=model | dict(moe=moe),
    optimizer=dict(learning_rate=3e-3, schedule=dict(warmup_steps=10)),
    mesh=dict(mesh),
    sample=dict(num_tokens=0),
  )
  return run_config.read(merge(base.finish(config), changes))


class Witness(Hook):
  """Records the state that a run begins with, and the rows of every batch."""

  def __init__(self, attempt: int, gradients: bool):
    """Makes the witness of one start of the run.

    Args:
      attempt: Number of the start.
      gradients: Whether the first step's gradient is written too.
    """
    self._attempt, self._gradients = attempt, gradients

  def start(self, run: Run) -> Run:
    """Wraps the run's step, so that batches are recorded before it."""
    step_of, self._run, self._number = run.train_step, run, 0

    def step(state, batch):
      if not self._number:
        self._begin(state, batch, int(state.step) + 1)
      self._write({'step': self._number, 'rows': row_digests(batch)})
      self._number += 1
      return step_of(state, batch)

    evaluations = [
      dataclasses.replace(entry, measure=self._witnessed(entry.measure))
      for entry in run.evaluations
    ]
    return dataclasses.replace(run, train_step=step, evaluations=evaluations)

  def _witnessed(self, measure: Measure) -> Measure:
    def witnessed(variables, step):
      self._write({'evaluating': step})
      return measure(variables, step)

    return witnessed

  def end(self, run: Run, state: Any) -> None:
    """Records the digests of the final state."""
    self._write({'end': int(state.step), 'arrays': digests(state)})

  def _begin(self, state, batch, number) -> None:
    run, self._number = self._run, number
    line = {
      'begin': number,
      'mesh': dict(run.mesh.shape),
      'processes': jax.process_count(),
      'arrays': digests(state),
    }
    if self._gradients:
      gradient = fetch(first_gradient(run, state, batch))
      if is_first():
        np.savez(run.workdir / f'gradient_{number}.npz', **by_path(gradient))
    self._write(line)

  def _write(self, line: dict[str, Any]) -> None:
    process = jax.process_index()
    line |= {'attempt': self._attempt, 'process': process, 'time': time.time()}
    name = WITNESS.replace('*', str(process))
    with (self._run.workdir / name).open('a') as file:
      file.write(json.dumps(line) + '\n')


def first_gradient(run: Run, state: Any, batch: Any) -> dict[str, Any]:
  """Loss and gradient of one step, computed on the run's mesh."""
  grad_fn = make_grad_fn(run.model, loss_weights(run.model))

  shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)

  @functools.partial(jax.jit, out_shardings=(None, shardings))
  def compute(state, batch):
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    inputs = batch, normalizers(run.model, batch), key, state.router_state
    (loss, _), grads = grad_fn(state.params, *inputs)
    return loss, grads

  loss, grads = compute(state, batch)
  return {'loss': loss, 'grads': grads}


def by_path(tree: Any) -> dict[str, np.ndarray]:
  """The leaves of a tree as numpy arrays, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def digests(tree: Any) -> dict[str, str]:
  """The sha256 of every global array, by path; all processes must call this."""
  return {
    path: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    for path, leaf in by_path(fetch(tree)).items()
  }


def row_digests(batch: Mapping[str, jax.Array]) -> dict[int, str]:
  """Digests of the rows that this process holds, by row of the global batch."""
  row_bytes = {}
  for name in sorted(batch):
    for shard in batch[name].addressable_shards:
      first = shard.index[0].indices(len(batch[name]))[0]
      for i, row in enumerate(np.asarray(shard.data), first):
        row_bytes.setdefault(i, {})[name] = row.tobytes()
  return {
    i: hashlib.sha256(b''.join(row.values())).hexdigest()[:16]
    for i, row in sorted(row_bytes.items())
  }


def main(workdir: str, spec_json: str, *coordination: str) -> None:
  """Trains to the end, unless the process is stopped.

  Args:
    workdir: Folder of the run.
    spec_json: The run's spec as JSON; see the module.
    *coordination: Coordinator's address, number of processes and this one's
      number; none for a single process.
  """
  spec = json.loads(spec_json)
  witness = Witness(spec.pop('attempt'), spec.pop('gradients'))
  options = make_options(**spec)
  cache = pathlib.Path(workdir).parent / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  processes = ()
  if coordination:
    address, count, index = coordination
    processes = address, int(count), int(index)
  with connected(options.distributed, *processes):
    train_and_evaluate(options, workdir, hooks=[witness], resume=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
