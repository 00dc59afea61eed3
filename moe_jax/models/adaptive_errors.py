"""The errors of adaptive mixtures of local experts, with their gradients.

Jacobs, Jordan, Nowlan and Hinton, https://doi.org/10.1162/neco.1991.3.1.79.
Three errors decide whether the experts share every case or compete for it. The
paper's symbols: o_i is an expert's output, p_i its mixing proportion (a softmax
of the gate's logits), d the target of a case. Not here: the mixture
(`adaptive.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Float32


class Gradients(NamedTuple):
  """The gradients of every case's error, by the formulas.

  Attributes:
    expert_outputs: float32 [N, E, V], with respect to each expert's output.
    gate_logits: float32 [N, E], with respect to the logits of the gate.
  """

  expert_outputs: Array
  gate_logits: Array


Outputs = Float32[Array, 'N E V']
Logits = Float32[Array, 'N E']
Targets = Float32[Array, 'N V']


def blend(outputs: Outputs, gate_probs: Logits) -> Targets:
  """The output of the mixture, sum_i p_i o_i."""
  return jnp.einsum('NEV,NE->NV', outputs, gate_probs)


def _distances(outputs: Outputs, targets: Targets) -> Logits:
  """The squared distance ||d - o_i||^2 of every case and expert."""
  return jnp.sum((targets[:, None, :] - outputs) ** 2, axis=-1)


def cooperative_loss(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Float32[Array, 'N']:
  """Equation 1.1, the error ||d - sum_i p_i o_i||^2 of the blend."""
  prediction = blend(outputs, jax.nn.softmax(gate_logits))
  return jnp.sum((targets - prediction) ** 2, axis=-1)


def gated_loss(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Float32[Array, 'N']:
  """Equation 1.2, sum_i p_i ||d - o_i||^2, the mean error of experts by p."""
  probs = jax.nn.softmax(gate_logits)
  return jnp.sum(probs * _distances(outputs, targets), axis=-1)


def _joint(outputs, gate_logits, targets) -> Logits:
  """The joint log density, log p_i - ||d - o_i||^2 / 2."""
  log_probs = jax.nn.log_softmax(gate_logits)
  return log_probs - 0.5 * _distances(outputs, targets)


def competitive_loss(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Float32[Array, 'N']:
  """Equation 1.3, -log sum_i p_i exp(-||d - o_i||^2 / 2), in nats.

  It is the negative log density of the target under a mixture of Gaussians of
  unit variance, without its constant.
  """
  return -jax.nn.logsumexp(_joint(outputs, gate_logits, targets), axis=-1)


def posterior(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Logits:
  """The h_i of equation 1.5: the probability that expert i made the target."""
  return jax.nn.softmax(_joint(outputs, gate_logits, targets))


def cooperative_gradients(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Gradients:
  """The gradients of equation 1.1, which the paper implies but does not print.

  They are -2 p_i (d - y) for o_i and -2 p_i (d - y).(o_i - y) for the gate,
  where y is the blend.
  """
  probs = jax.nn.softmax(gate_logits)
  prediction = blend(outputs, probs)
  error = (targets - prediction)[:, None, :]  # [N, 1, V]
  projections = jnp.sum(error * (outputs - prediction[:, None, :]), axis=-1)
  return Gradients(-2 * probs[..., None] * error, -2 * probs * projections)


def gated_gradients(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Gradients:
  """The gradients of equation 1.2; the experts' is 1.4, -2 p_i (d - o_i).

  The gate's is p_i (||d - o_i||^2 - E): an expert that does better than the
  weighted average gets more of the case.
  """
  probs = jax.nn.softmax(gate_logits)
  errors = targets[:, None, :] - outputs
  distances = _distances(outputs, targets)
  mean = jnp.sum(probs * distances, axis=-1, keepdims=True)
  return Gradients(-2 * probs[..., None] * errors, probs * (distances - mean))


def competitive_gradients(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Gradients:
  """The gradients of equation 1.3; the experts' is 1.5, -h_i (d - o_i).

  The gate's is p_i - h_i. Where all p_i are equal and all distances above 1,
  this moves the best-fitting expert fastest, equation 1.4 slowest.
  """
  h = posterior(outputs, gate_logits, targets)
  errors = targets[:, None, :] - outputs
  return Gradients(-h[..., None] * errors, jax.nn.softmax(gate_logits) - h)


LOSSES = {
  'cooperative': cooperative_loss,
  'gated': gated_loss,
  'competitive': competitive_loss,
}
GRADIENTS = {
  'cooperative': cooperative_gradients,
  'gated': gated_gradients,
  'competitive': competitive_gradients,
}
