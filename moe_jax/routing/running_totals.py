"""Balancing a soft mixture: experts ahead of the mean by a margin sit out.

Deep mixture of experts, https://arxiv.org/abs/1312.4314. The form of the
paper's equation could not be verified: this is the rule as later code and
summaries have it. Not here: where the totals are kept (the collection
`router_state`), and when they are updated (`moe_jax.training.step`).
"""

import jax
import jax.numpy as jnp

from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Bool, Float32


@checked
def overused(totals: Float32[Array, ' E'], margin: float) -> Bool[Array, ' E']:
  """Whether each total exceeds the mean by more than `margin`; never all do.

  Args:
    totals: G_i, the gates of expert i summed over all examples so far. A
      constant added to all of them changes nothing.
    margin: The number of examples by which a total may exceed the mean; at
      least 0.
  """
  # No one is above the mean where all are equal, but for a rounded mean.
  return (totals - totals.mean() > margin) & (totals > totals.min())


@checked
def constrained_gates(
  router_logits: Float32[Array, 'B E'], overused: Bool[Array, ' E']
) -> Float32[Array, 'B E']:
  """Softmax gates: 0 for overused experts, those of the others sum to 1.

  Overused experts get no gradient. To leave out their logits is to
  renormalise the gates, but for gates too small for float32 to divide by.
  """
  open_logits = jnp.where(overused[None], -jnp.inf, router_logits)
  return jax.nn.softmax(open_logits, axis=-1)


@checked
def moved(
  totals: Float32[Array, ' E'], mass: Float32[Array, ' E']
) -> Float32[Array, ' E']:
  """The totals after a step, less their mean.

  Unlike a plain sum, the totals do not grow with the run, where float32
  would soon lose single gates.

  Args:
    totals: The totals before the step.
    mass: The gates that the model used, summed over the step's examples.
  """
  totals = totals + mass
  return totals - totals.mean(keepdims=True)
