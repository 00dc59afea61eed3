"""Loss and drops of rows that a model reads token by token, as in generation.

The tokens that all rows read in one step are one group: with a capacity they
compete for slots with each other, not with other tokens of their rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import generation
from moe_jax.data.pipeline import spread
from moe_jax.errors import InputError
from moe_jax.layers.experts import Gather
from moe_jax.models import Model
from moe_jax.models.recorded import Choices, recording
from moe_jax.routing.capacity import All, Fixed
from moe_jax.shapes import Array, Float32, Int32
from moe_jax.training.evaluate import Variables
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState


def measure(
  run: Run, state: TrainState, slots: int, num_rows: int
) -> dict[str, float]:
  """Measures validation rows that are read token by token, all at once.

  Args:
    run: A run of a decoder, all of whose mixtures have the same options.
    state: Its last state.
    slots: Number of slots of an expert in each step; 0 gives all tokens room.
    num_rows: Number of rows, each of one document: B.

  Returns:
    loss, in nats a token; dropped, the share of choices.

  Raises:
    ValueError: There are fewer such rows.
  """
  batch = whole_rows(run, num_rows)
  logits, chosen = read(
    stepping_model(run, slots),
    run.programs.variables(state),
    jnp.asarray(batch['tokens']),
  )
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['targets']
  )
  weights = batch['loss_weights']
  masks = [np.asarray(layer.kept) for layer in (chosen or {}).values()]
  return {
    'loss': float((nats * weights).sum() / weights.sum()),
    'dropped': float(1 - np.mean(masks)) if masks else 0.0,
  }


def whole_rows(run: Run, num_rows: int) -> dict[str, np.ndarray]:
  """Validation rows of one document each, spread over the split.

  A model that decodes takes a row for one document.
  """
  rows = run.dataset.splits['validation']
  examples = rows.take(np.array(spread(len(rows), 2 * num_rows)))
  is_whole = (examples['segment_ids'] == 1).all(1)
  if (num_whole := int(is_whole.sum())) < num_rows:
    raise InputError(
      f'num_rows={num_rows}, but {num_whole} rows have one document'
    )
  chosen = np.flatnonzero(is_whole)[np.array(spread(num_whole, num_rows))]
  return {key: value[chosen] for key, value in examples.items()}


def stepping_model(run: Run, slots: int) -> Model:
  """The run's model with so many slots of an expert for the whole batch."""
  options = run.options.filled(run.dataset.vocab_size)
  moe = options.model.moe
  if moe.num_experts:
    capacity = Fixed(slots=slots) if slots else All()
    # The tokens of one step are of one time, so that none sees a later one.
    moe = dataclasses.replace(
      moe,
      capacity=capacity,
      dispatch=Gather(),
      group_size=-1,
      allow_future_leak=True,
    )
    model = dataclasses.replace(options.model, moe=moe)
    options = dataclasses.replace(options, model=model)
  return options.build()


def read(
  model: Model, variables: Variables, tokens: Int32[Array, 'B T']
) -> tuple[Float32[Array, 'B T V'], Choices]:
  """Logits at every token, and the choices of each step, token by token."""
  prepared = generation.prepare(model, variables, batch_size=len(tokens))
  logits, chosen = _read(*prepared, tokens)
  return jnp.moveaxis(logits, 0, 1), chosen


@functools.partial(jax.jit, static_argnames='model')
def _read(model, variables, tokens):
  B, T = tokens.shape

  def step(cache, token):
    (logits, cache), chosen = recording(
      model,
      variables,
      token[:, None],
      jnp.ones((B, 1), bool),
      cache,
      method='decode',
    )
    return cache, (logits[:, 0], chosen)

  return jax.lax.scan(step, model.make_cache(B, T), tokens.T)[1]
