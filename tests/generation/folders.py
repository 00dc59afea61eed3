"""Writes folders of runs as training does, without training."""

import jax
import jax.numpy as jnp

from moe_jax import run_config
from moe_jax.data import tokenizers
from moe_jax.models.trees import init_router_state
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.retention import CheckpointOptions
from tests.models import tiny
from tests.training import tiny as tiny_runs


def write(
  folder, steps=(3,), tokenizer=None, change=lambda params: params, **overrides
):
  """Writes a run with a checkpoint at each step; returns their parameters.

  Args:
    folder: The folder.
    steps: The steps.
    tokenizer: The tokenizer; None is that of bytes.
    change: A function that changes the parameters.
    **overrides: Keys of the config.
  """
  config = tiny_runs.config(**overrides)
  workdir_lib.claim(folder, config)
  tokenizer = tokenizer or tokenizers.Bytes()
  tokenizer.save(folder / workdir_lib.TOKENIZER)
  options = run_config.read(config)
  model = tiny_runs.model_of(options, tokenizer.vocab_size)
  params = {step: change(tiny.params_of(model, step)) for step in steps}
  router_state = jax.tree.map(
    lambda x: jnp.linspace(0, 0.1, x.size, dtype=x.dtype).reshape(x.shape),
    init_router_state(model),
  )
  kept = CheckpointOptions(keep_newest=3, keep_best=False)
  with Checkpointer(folder / workdir_lib.CHECKPOINTS, kept) as checkpoints:
    for step in steps:
      # This stands for the optimizer's state, which generation does not read.
      other_trees = {'opt_state': jax.tree.map(jnp.zeros_like, params[step])}
      if router_state:
        other_trees['router_state'] = router_state
      trees = {'params': params[step], **other_trees}
      # The first is the best one.
      metrics = {options.checkpoint.best_name: float(step)}
      checkpoints.save(step, trees, metrics=metrics)
  return params


def damage(folder, step):
  """Changes a checkpoint so that it does not match its manifest."""
  files = (folder / workdir_lib.CHECKPOINTS / str(step)).rglob('*')
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])
