"""Measures whether a trained model's outputs depend on later tokens.

Groups must have one row: the prefixes of a row, which are evaluated together,
would compete for experts in larger groups.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.data.pipeline import spread
from moe_jax.errors import InputError
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Number of rows that are measured, evenly spaced over the validation split.
_ROWS = 32
# Largest difference of logits that counts as rounding.
_EQUAL = 1e-4


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures the leak of later tokens on a few validation rows.

  Returns:
    Numbers by name:
    - leak/changed: share of outputs in the first half of a row that change when
      the tokens of its second half do.
    - leak/at_once: loss of whole rows, as in training, in nats a token.
    - leak/generated: loss of the same rows where the output at t is computed
      from a row that ends at t, as in generation, in nats a token. It equals
      `leak/at_once` where nothing leaks, except with random routers, which draw
      other experts for another batch.

  Raises:
    ValueError: The model does not continue a text, or its groups have several
      rows.
  """
  _check(run)
  rows = run.dataset.splits['validation']
  examples = rows.take(np.array(spread(len(rows), _ROWS)))
  batch = {key: jnp.asarray(value) for key, value in examples.items()}
  model, variables = run.model, run.programs.variables(state)
  apply = jax.jit(
    lambda batch: model.apply(variables, **model.inputs(batch))[0]
  )
  logits = apply(batch)
  return {
    'leak/changed': _changed(apply, batch, logits),
    'leak/at_once': _loss(logits, batch),
    'leak/generated': _loss(generated_logits(apply, batch), batch),
  }


def _check(run: Run) -> None:
  model, moe = run.model, run.model.stacks.moe
  if model.has_encoder:
    raise InputError(
      f'{type(model).__name__} does not continue a text; leaks are those of a '
      'model that does'
    )
  most = run.options.data.seq_len
  if moe is not None and not 0 <= moe.group_size <= most:
    raise InputError(
      f'moe.group_size={moe.group_size} has several rows in a group; leaks are '
      f'measured in groups of one: 0, or up to data.seq_len={most}'
    )


def _changed(apply, batch, logits) -> float:
  half = batch['tokens'].shape[1] // 2
  shares, n = [], len(batch['tokens'])
  for row in range(n):
    other = batch['tokens'][(row + 1) % n, half:]
    tokens = batch['tokens'].at[row, half:].set(other)
    changed = apply({**batch, 'tokens': tokens})
    difference = jnp.abs(changed - logits)[row, :half].max(-1)
    shares.append(float((difference > _EQUAL).mean()))
  return float(np.mean(shares))


def generated_logits(apply, batch) -> jax.Array:
  """Logits at every position, computed from the prefix that ends there.

  Args:
    apply: Function from a batch to its logits.
    batch: The rows.

  Returns:
    Logits, [rows, T, V].
  """
  _, T = batch['tokens'].shape
  until = jnp.tri(T, dtype=bool)  # row t is True where prefix t has tokens

  def of_row(i):
    row = jax.tree.map(lambda x: x[i], batch)
    cut = {key: jnp.where(until, value[None], 0) for key, value in row.items()}
    return jnp.diagonal(apply(cut), axis1=0, axis2=1).T

  return jnp.stack([of_row(i) for i in range(len(batch['tokens']))])


def _loss(logits, batch) -> float:
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['targets']
  )
  weights = batch['loss_weights']
  return float((nats * weights).sum() / weights.sum())
