"""Compiles training steps for `bench_train_step`, on random tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks import timing
from experiments.benchmarks.roofline import Work
from moe_jax import run_config
from moe_jax.analysis import cost
from moe_jax.config import layered
from moe_jax.run_config import RunConfig
from moe_jax.training.programs import Programs, make_programs

# Size of the vocabulary where the config leaves it to a tokenizer.
BYTES_VOCABULARY = 257


def prepared(config: ConfigDict, overrides: Mapping[str, Any]) -> RunConfig:
  """The run's options on one device, with the vocabulary's size filled in.

  Args:
    config: Config of the sparse run.
    overrides: Nested values that a case changes in the config's `model`.
  """
  mesh = dict(data=1, fsdp=1, expert=1, tensor=1)
  changes = {'mesh': mesh, 'model': overrides}
  options = run_config.read(layered(RunConfig, config, changes))
  return options.filled(options.model.vocab_size or BYTES_VOCABULARY)


def random_batch(options: RunConfig) -> dict[str, np.ndarray]:
  """A batch of full rows of random tokens: a step's cost ignores the text."""
  rng = np.random.default_rng(0)
  batch = {}
  for name, leaf in options.batch_shapes(options.build()).items():
    if name.endswith('positions'):
      positions = np.arange(leaf.shape[1], dtype=leaf.dtype)
      batch[name] = np.broadcast_to(positions, leaf.shape).copy()
    elif name.endswith('tokens') or name == 'targets':
      high = options.model.vocab_size
      batch[name] = rng.integers(0, high, leaf.shape, leaf.dtype)
    else:  # segment ids and loss weights: one segment, every token counts
      batch[name] = np.ones(leaf.shape, leaf.dtype)
  return batch


def compile_step(options: RunConfig) -> timing.Program:
  """The training step of `prepared` options, with a state of its own."""
  model, mesh = options.build(), options.mesh.make(jax.devices()[:1])
  programs = make_programs(options, model, mesh)
  batch = programs.put(random_batch(options))
  arguments = programs.abstract_state, batch
  step, numbers = timing.compiled(programs.train_step, *arguments)
  states = []

  def run():
    state = states.pop() if states else programs.init_state()
    state, metrics = step(state, batch)
    states.append(state)
    jax.block_until_ready((state, metrics))

  return timing.Program(run, step_work(options, programs), numbers)


def step_work(options: RunConfig, programs: Programs) -> Work:
  """The least work of a step: its matrix products' FLOPs and its state's bytes.

  Parameters are read forward and backward, gradients are written and read, and
  the state (parameters and moments) is read and written. Activations are left
  out: how many of them reach memory depends on caches and on rematerialisation,
  whose recomputation is not counted either.
  """

  def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  state = programs.abstract_state
  price = cost.count(options.build(), options.data.seq_len)
  tokens = options.batch_size * options.data.seq_len
  return Work(
    flops=price.training_flops * tokens,
    min_bytes=4 * size(state.params) + 2 * size(state),
  )
