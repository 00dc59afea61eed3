"""The small byte-level models that studies train on two cores."""

from typing import Any

import ml_collections

from configs import base
from experiments.study.study import Arm, Column

EVAL = 'main'  # the validation loss, at the training's capacity
LOSS = Column('loss', f'eval/{EVAL}/loss', 'nats/byte')
_BATCHES = 40  # of validation

# Of `model.moe`.
DROPLESS = dict(capacity_rule='all', dispatch='dropless')
UNBALANCED = dict(balance_weight=0.0, z_weight=0.0)


def decoder(
  steps: int,
  *,
  width: int = 64,
  hidden: int = 256,
  num_layers: int = 4,
  **moe: Any,
) -> ml_collections.ConfigDict:
  """A causal model of the embedded corpus, every feed-forward sparse.

  Args:
    steps: Of the run; the learning rate falls to a twentieth over them.
    width: M.
    hidden: F of a dense feed-forward; a sparse layer's experts have as much
      where `moe.hidden` says nothing else.
    num_layers: L.
    **moe: Of `model.moe`.
  """
  config = base.get_config()
  config.total_steps = steps
  config.batch_size = 32
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
  m.moe.update(moe)
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = min(100, steps // 8)
  config.optimizer.final_fraction = 0.05
  config.checkpoint.every_steps = 0
  config.checkpoint.keep_best = False
  config.evals = {EVAL: evaluation()}
  return config


def evaluation(**moe: Any) -> ml_collections.ConfigDict:
  """At the end of a run; `moe` is changed for it."""
  overrides = {'moe': moe} if moe else {}
  return base.evaluation(every_steps=0, num_batches=_BATCHES, **overrides)


def no_drops() -> ml_collections.ConfigDict:
  """An evaluation with room for every token."""
  return evaluation(**DROPLESS)


def dense(name: str = 'dense', **overrides: Any) -> Arm:
  """The model without experts."""
  return Arm(name, {'model.moe.num_experts': 0, **overrides})


def top_k(
  name: str,
  K: int,
  hidden: int,
  line: str = '',
  x: float | None = None,
  **moe: Any,
) -> Arm:
  """A model that sends a token to K experts.

  Args:
    name: Of the arm.
    K: Experts of a token.
    hidden: K times an expert's F; for equal FLOPs, the dense model's F.
    line: See `Arm`.
    x: See `Arm`.
    **moe: Of `model.moe`.
  """
  gates = 'raw' if K == 1 else 'renormalized'
  moe = dict(num_selected=K, hidden=hidden // K, gates=gates) | moe
  overrides = {f'model.moe.{key}': value for key, value in moe.items()}
  return Arm(name, overrides, line, x)
