"""Training steps of tiny models whose choices of experts are recorded.

This module has no tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.analysis import replay
from moe_jax.analysis.recording import records_of
from moe_jax.models.recorded import recording
from moe_jax.models.trees import init_router_state, move_router_state
from moe_jax.models.trees import variables as variables_of
from moe_jax.partitioning import ShardingOptions
from moe_jax.training.losses import LossWeights, normalizers
from moe_jax.training.step import TrainState, make_grad_fn, train_step
from tests.models import tiny

B, T, V = 8, 6, 28
RULES = ShardingOptions().rules
OPTIMIZER = optax.adam(1e-2)
RECORDED = functools.partial(recording, logits=False, dtype='float32')


@functools.cache
def batch_of(step=0):
  """A batch with padding, two segments in a row and a task for each row."""
  rng = np.random.default_rng(step)
  segment_ids = np.ones((B, T), np.int32)
  segment_ids[1:, 3:] = 2
  segment_ids[0, 4:] = 0
  return {
    'task_ids': np.tile(np.arange(B, dtype=np.int32)[:, None] % 3, (1, T)),
    'tokens': rng.integers(0, V, (B, T), np.int32),
    'targets': rng.integers(0, V, (B, T), np.int32),
    'segment_ids': segment_ids,
    'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    'loss_weights': (segment_ids > 0).astype(np.float32),
  }


def first_state(model):
  """A state before training whose balancing bias is not zero."""
  params = tiny.params_of(model)
  rng = np.random.default_rng(1)
  state = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype),
    init_router_state(model),
  )
  return TrainState(
    jnp.int32(0), jnp.uint32(3), params, OPTIMIZER.init(params), state
  )


@functools.cache
def compiled(model):
  """The compiled training step (state, batch) -> (state, metrics)."""
  weights = LossWeights(dict.fromkeys(model.stacks.loss_weights(), 0.1))
  return jax.jit(
    functools.partial(
      train_step,
      grad_fn=make_grad_fn(model, weights, 1, apply=RECORDED),
      optimizer=OPTIMIZER,
      rate=optax.constant_schedule(0.0),
      normalize=functools.partial(normalizers, model),
      move_router_state=functools.partial(move_router_state, model.stacks),
    )
  )


def records(model, batch, choices, step=0):
  """The records of the choices in a batch, one for each sequence."""
  return [*records_of(model, 'train', step, 0, batch, jax.device_get(choices))]


def record(model, batch, choices, step=0):
  """The record of the choices that a step made in a batch of one sequence."""
  (only_record,) = records(model, batch, choices, step)
  return only_record


@functools.cache
def forward(model):
  """A compiled (batch) -> (logits, aux, choices) of the first state."""
  state = first_state(model)
  variables = variables_of(state.params, state.router_state)

  def apply(batch):
    outputs, choices = RECORDED(model, variables, **model.inputs(batch))
    return *outputs, choices

  return jax.jit(apply)


def run(model, records=(), *, steps=3):
  """Takes steps; returns the state, the metrics, and the records of steps.

  Args:
    model: The model.
    records: The record of each step, which is replayed. Default: routers
      choose.
    steps: The number of steps.
  """
  state, metrics, new_records = first_state(model), [], []
  for step in range(steps):
    batch = batch_of(step)
    imposed_batch = replay.imposed(model, batch, *records[step : step + 1])
    state, step_metrics = compiled(model)(state, imposed_batch)
    new_records.append(record(model, batch, step_metrics.sums.choices, step))
    sums = step_metrics.sums._replace(choices=None)
    metrics.append(jax.device_get(step_metrics._replace(sums=sums)))
  return jax.device_get(state), metrics, new_records
