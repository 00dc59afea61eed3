"""Whether a trained model's outputs see later tokens, and what that is worth.

Not here: which settings leak by their rules (`moe_jax.models.leaks_future`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

_ROWS = 8  # of the validation split
_EQUAL = 1e-4  # logits that differ by less are rounded otherwise


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Losses and a leak on a few validation rows, in nats per token.

  Returns:
    `leak/changed`: the share of outputs in the first half of a row that change
    when the tokens of its second half do. `leak/at_once`: the loss of whole
    rows, as in training. `leak/generated`: the loss of the same rows where the
    output at t comes of a row that ends at t, as in generation. The last two
    agree where nothing leaks.
  """
  taken = run.dataset.splits['validation'].take(np.arange(_ROWS))
  batch = {key: jnp.asarray(value) for key, value in taken.items()}
  apply = jax.jit(
    lambda batch: run.model.apply(state.variables, **run.model.inputs(batch))[0]
  )
  logits = apply(batch)
  return {
    'leak/changed': _changed(apply, batch, logits),
    'leak/at_once': _loss(logits, batch),
    'leak/generated': _loss(_generated(apply, batch), batch),
  }


def _changed(apply, batch, logits) -> float:
  half = batch['tokens'].shape[1] // 2
  shares = []
  for row in range(_ROWS):
    other = batch['tokens'][(row + 1) % _ROWS, half:]
    tokens = batch['tokens'].at[row, half:].set(other)
    changed = apply({**batch, 'tokens': tokens})
    difference = jnp.abs(changed - logits)[row, :half].max(-1)
    shares.append(float((difference > _EQUAL).mean()))
  return float(np.mean(shares))


def _generated(apply, batch) -> jax.Array:
  """Each output from the prefix that ends there; [rows, T, V]."""
  _, T = batch['tokens'].shape
  until = jnp.tri(T, dtype=bool)  # prefix t is what it sees of a row

  def of_row(i):
    row = jax.tree.map(lambda x: x[i], batch)
    cut = {key: jnp.where(until, value[None], 0) for key, value in row.items()}
    return jnp.diagonal(apply(cut), axis1=0, axis2=1).T

  return jnp.stack([of_row(i) for i in range(_ROWS)])


def _loss(logits, batch) -> float:
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['targets']
  )
  weights = batch['loss_weights']
  return float((nats * weights).sum() / weights.sum())
