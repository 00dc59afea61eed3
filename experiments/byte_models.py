"""The small byte-level models that studies train on two cores."""

import ml_collections

from configs import base

EVAL = 'main'  # the validation loss, at the training's capacity
_BATCHES = 40  # of validation


def decoder(
  steps: int,
  *,
  width: int = 64,
  hidden: int = 256,
  num_layers: int = 4,
  batch_size: int = 32,
) -> ml_collections.ConfigDict:
  """A causal model of the embedded corpus, every feed-forward sparse.

  Args:
    steps: Of the run; the learning rate falls to a twentieth over them.
    width: M.
    hidden: F of a dense feed-forward; a sparse layer's experts have as much
      where `moe.hidden` says nothing else.
    num_layers: L.
    batch_size: Sequences of 64 bytes.
  """
  config = base.get_config()
  config.total_steps = steps
  config.batch_size = batch_size
  config.log_every_steps = max(steps // 10, 1)
  config.data.seq_len = 64
  m = config.model
  m.num_layers = num_layers
  m.width = width
  m.num_heads = 4
  m.hidden = hidden
  m.scan_layers = False  # a CPU slices scanned kernels
  m.moe.layers = 'all'
  m.moe.group_size = -1  # the batch: as capacity and balance are most even
  m.moe.capacity_rule = 'per_assignment'
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = min(100, steps // 8)
  config.optimizer.final_fraction = 0.05
  config.checkpoint.every_steps = 0
  config.checkpoint.keep_best = False
  config.evals = {EVAL: base.evaluation(every_steps=0, num_batches=_BATCHES)}
  return config


def no_drops() -> ml_collections.ConfigDict:
  """An evaluation with room for every token."""
  moe = dict(capacity_rule='all', dispatch='dropless')
  return base.evaluation(every_steps=0, num_batches=_BATCHES, moe=moe)
