"""Adaptive mixtures of local experts, and the three errors that they minimise.

Jacobs, Jordan, Nowlan and Hinton, https://doi.org/10.1162/neco.1991.3.1.79. In
the paper's symbols o_i is an expert's output, p_i its mixing proportion (a
softmax of the gate's logits), d the target of a case and y = sum_i p_i o_i the
output of the mixture. Experts that share a case cooperate; experts that are
each measured against its target compete for it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import zeros

# Weights are drawn uniformly between minus and plus this number, which the
# paper does not state. The gate's start at zero, as proportions start equal.
INIT_SCALE = 0.5
OUTPUTS = {
  'linear': lambda x: x,
  'logistic': jax.nn.sigmoid,
  'softmax': jax.nn.softmax,
}


def _uniform(key, shape):
  return jax.random.uniform(key, shape, jnp.float32, -INIT_SCALE, INIT_SCALE)


class Outputs(NamedTuple):
  """The outputs of a mixture for N cases, float32.

  Attributes:
    experts: The output o_i of each expert, [N, E, V].
    gate_logits: The logits of the gate, [N, E].
    gate_probs: The mixing proportions p_i, [N, E].
    prediction: The output y of the mixture, [N, V].
  """

  experts: Any
  gate_logits: Any
  gate_probs: Any
  prediction: Any


class Mixture(nn.Module):
  """Experts and a linear gate that read the same features; all experts run.

  One expert with hidden units is the paper's back-propagation network.

  Attributes:
    num_experts: Number E of experts.
    expert_hidden: Number of hidden logistic units of an expert; 0: an expert
      is linear.
    output: Function on an expert's outputs, a key of `OUTPUTS`. The paper's is
      'logistic', for one output, as far as its decision lines tell.
    num_outputs: Number V of outputs of an expert.
  """

  num_experts: int
  expert_hidden: int = 0
  output: str = 'logistic'
  num_outputs: int = 1

  @nn.compact
  def __call__(self, x) -> Outputs:
    """The outputs for features x, float32 [N, M]."""
    M, E = x.shape[-1], self.num_experts
    F, V = self.expert_hidden, self.num_outputs
    hidden, equation = x, 'NM,EMV->NEV'
    if F:
      hidden = self._layer('expert_in', 'NM,EMF->NEF', x, (E, M, F))
      hidden, equation = jax.nn.sigmoid(hidden), 'NEF,EFV->NEV'
    outputs = self._layer('expert_out', equation, hidden, (E, F or M, V))
    outputs = OUTPUTS[self.output](outputs)
    logits = self._layer('gate_out', 'NM,ME->NE', x, (M, E), zeros)
    probs = jax.nn.softmax(logits)
    return Outputs(outputs, logits, probs, blend(outputs, probs))

  def _layer(self, name, equation, x, shape, init=_uniform):
    """The product with a kernel of the shape, plus a bias of its outputs."""
    kernel = self.param(name, init, shape)
    bias = self.param(f'{name}_bias', init, (*shape[:-2], shape[-1]))
    return jnp.einsum(equation, x, kernel) + bias[None]


def blend(outputs, probs):
  """The output of the mixture, sum_i p_i o_i."""
  return jnp.einsum('NEV,NE->NV', outputs, probs)


def _distances(outputs, targets):
  """The squared distance ||d - o_i||^2 of every case and expert, [N, E]."""
  return jnp.sum((targets[:, None, :] - outputs) ** 2, axis=-1)


def cooperative_loss(outputs, gate_logits, targets):
  """Equation 1.1, the error ||d - y||^2 of the blend, [N].

  Its gradients, which the paper implies but does not print, are -2 p_i (d - y)
  for o_i, and -2 p_i (d - y).(o_i - y) for the gate's logits.
  """
  prediction = blend(outputs, jax.nn.softmax(gate_logits))
  return jnp.sum((targets - prediction) ** 2, axis=-1)


def gated_loss(outputs, gate_logits, targets):
  """Equation 1.2, sum_i p_i ||d - o_i||^2, the mean error of experts by p.

  Its gradient for o_i is equation 1.4, -2 p_i (d - o_i). The gate's is p_i
  (||d - o_i||^2 - E), where E is the error: an expert that does better than the
  weighted average gets more of the case.
  """
  probs = jax.nn.softmax(gate_logits)
  return jnp.sum(probs * _distances(outputs, targets), axis=-1)


def competitive_loss(outputs, gate_logits, targets):
  """Equation 1.3, -log sum_i p_i exp(-||d - o_i||^2 / 2), in nats.

  It is the negative log density of the target under a mixture of Gaussians of
  unit variance, without its constant. Its gradient for o_i is equation 1.5,
  -h_i (d - o_i), with h_i the probability that expert i made the target; the
  gate's is p_i - h_i. Where all p_i are equal and all distances above 1, this
  moves the best-fitting expert fastest, equation 1.4 slowest.
  """
  log_probs = jax.nn.log_softmax(gate_logits)
  joint = log_probs - 0.5 * _distances(outputs, targets)
  return -jax.nn.logsumexp(joint, axis=-1)


LOSSES = {
  'cooperative': cooperative_loss,
  'gated': gated_loss,
  'competitive': competitive_loss,
}
