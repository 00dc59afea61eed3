"""Adaptive mixtures of local experts: where gated experts begin, in 1991.

Jacobs, Jordan, Nowlan and Hinton, https://doi.org/10.1162/neco.1991.3.1.79.
Small experts and a gate see the same features; three errors decide whether
the experts share every case or compete for it. A mixture of one expert with a
hidden layer is the paper's back-propagation network. Not here: its experiment
(`experiments/jacobs_table1.py`).

The gate is what is a router elsewhere. The paper's symbols: o_i is an expert's
output, p_i its mixing proportion (a softmax of the gate's logits), d the target
of a case.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.routing import MoeAux, empty_aux
from moe_jax.shapes import Array, Float32, Int

OUTPUTS = ('linear', 'logistic', 'softmax')


class AdaptiveOutputs(NamedTuple):
  """What a mixture says of N cases.

  Attributes:
    expert_outputs: float32 [N, E, V], every expert's own o_i.
    gate_logits: float32 [N, E].
    gate_probs: float32 [N, E], the p_i.
    prediction: float32 [N, V], the blend sum_i p_i o_i.
  """

  expert_outputs: Array
  gate_logits: Array
  gate_probs: Array
  prediction: Array


class Gradients(NamedTuple):
  """Of every case's error, as the formulas have it.

  Attributes:
    expert_outputs: float32 [N, E, V].
    gate_logits: float32 [N, E].
  """

  expert_outputs: Array
  gate_logits: Array


Outputs = Float32[Array, 'N E V']
Logits = Float32[Array, 'N E']
Targets = Float32[Array, 'N V']


def blend(outputs: Outputs, gate_probs: Logits) -> Targets:
  """sum_i p_i o_i, what the mixture answers."""
  return jnp.einsum('NEV,NE->NV', outputs, gate_probs)


def _distances(outputs: Outputs, targets: Targets) -> Logits:
  """||d - o_i||^2 of every case and expert."""
  return jnp.sum((targets[:, None, :] - outputs) ** 2, axis=-1)


def cooperative_loss(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Float32[Array, 'N']:
  """Equation 1.1, ||d - sum_i p_i o_i||^2: experts cancel others' errors."""
  prediction = blend(outputs, jax.nn.softmax(gate_logits))
  return jnp.sum((targets - prediction) ** 2, axis=-1)


def gated_loss(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Float32[Array, 'N']:
  """Equation 1.2, sum_i p_i ||d - o_i||^2: of an expert drawn by p."""
  probs = jax.nn.softmax(gate_logits)
  return jnp.sum(probs * _distances(outputs, targets), axis=-1)


def _joint(outputs, gate_logits, targets) -> Logits:
  """log p_i - ||d - o_i||^2 / 2."""
  log_probs = jax.nn.log_softmax(gate_logits)
  return log_probs - 0.5 * _distances(outputs, targets)


def competitive_loss(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Float32[Array, 'N']:
  """Equation 1.3, -log sum_i p_i exp(-||d - o_i||^2 / 2), in nats.

  The negative log density of the target under a mixture of Gaussians of unit
  variance, less its constant.
  """
  return -jax.nn.logsumexp(_joint(outputs, gate_logits, targets), axis=-1)


def posterior(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Logits:
  """The h_i of equation 1.5: how probably the target came from expert i."""
  return jax.nn.softmax(_joint(outputs, gate_logits, targets))


def cooperative_gradients(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Gradients:
  """Of equation 1.1: every expert gets the error of the blend.

  -2 p_i (d - y) for o_i and -2 p_i (d - y).(o_i - y) for the gate, y the
  blend; implied by the paper, not printed.
  """
  probs = jax.nn.softmax(gate_logits)
  prediction = blend(outputs, probs)
  error = (targets - prediction)[:, None, :]  # [N, 1, V]
  along = jnp.sum(error * (outputs - prediction[:, None, :]), axis=-1)
  return Gradients(-2 * probs[..., None] * error, -2 * probs * along)


def gated_gradients(
  outputs: Outputs, gate_logits: Logits, targets: Targets
) -> Gradients:
  """Of equation 1.2. Equation 1.4, -2 p_i (d - o_i), is that of the experts.

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
  """Of equation 1.3. Equation 1.5, -h_i (d - o_i), is that of the experts.

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


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
  """A mixture of experts and its error.

  Attributes:
    vocab_size: V, outputs of an expert: the number of classes.
    feature_shape: Of one case.
    loss: One of `LOSSES`.
    num_experts: E.
    expert_hidden: Hidden logistic units of an expert; 0: it is linear.
    gate_hidden: Of the gate.
    expert_output: What an expert's outputs pass through. 'logistic' (the
      paper's, as far as its decision lines tell, of one output) and 'softmax'
      keep a linear expert's decision surface linear.
    init_scale: Weights start uniform between minus and plus this; the paper
      does not say. The gate's last layer starts at zero, so that all mixing
      proportions are equal, as they are there.

  Raises:
    ValueError: A size is out of range or a name unknown.
  """

  vocab_size: int
  feature_shape: tuple[int, ...]
  loss: str = 'competitive'
  num_experts: int = 4
  expert_hidden: int = 0
  gate_hidden: int = 0
  expert_output: str = 'softmax'
  init_scale: float = 0.5

  # What other models' configs have: no layer here is a sparse feed-forward.
  moe = None
  sparse = (False,)
  stacks = ()

  def __post_init__(self):
    if self.loss not in LOSSES:
      raise unknown('adaptive.loss', self.loss, LOSSES)
    if self.expert_output not in OUTPUTS:
      raise unknown('adaptive.expert_output', self.expert_output, OUTPUTS)
    for name, least in (
      ('vocab_size', 1),
      ('num_experts', 1),
      ('expert_hidden', 0),
      ('gate_hidden', 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(f'{name}={getattr(self, name)} is below {least}')
    if not self.init_scale > 0:
      raise ValueError(
        f'init_scale={self.init_scale} is not positive: experts would start '
        'alike and stay so'
      )


class AdaptiveMixture(nn.Module):
  """Experts and gate on the same features; dense, every expert runs.

  Attributes:
    config: Its `AdaptiveConfig`.
  """

  config: AdaptiveConfig

  @nn.compact
  def __call__(
    self, features: Float32[Array, 'N *shape'], train: bool = False
  ) -> tuple[AdaptiveOutputs, MoeAux]:
    """What experts, gate and blend say; `train` changes nothing."""
    del train
    c = self.config
    x = features.reshape(features.shape[0], math.prod(features.shape[1:]))
    outputs = self._experts(x)  # [N, E, V]
    if c.expert_output == 'logistic':
      outputs = jax.nn.sigmoid(outputs)
    elif c.expert_output == 'softmax':
      outputs = jax.nn.softmax(outputs)
    logits = self._gate(x)  # [N, E]
    probs = jax.nn.softmax(logits)
    aux = jax.tree.map(lambda a: a[None], empty_aux(c.num_experts, 1))
    made = AdaptiveOutputs(outputs, logits, probs, blend(outputs, probs))
    return made, aux

  def _weights(self, name: str, shape, axes, zero: bool = False) -> Array:
    """A kernel or bias, float32."""
    scale = self.config.init_scale

    def uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -scale, scale)

    start = nn.initializers.zeros if zero else uniform
    start = nn.with_logical_partitioning(start, axes)
    return self.param(name, start, shape, jnp.float32)

  def _experts(self, x: Float32[Array, 'N M']) -> Outputs:
    c = self.config
    M, E, F, V = x.shape[-1], c.num_experts, c.expert_hidden, c.vocab_size
    if F:
      hidden = self._weights('expert_in', (E, M, F), ('expert', None, None))
      bias = self._weights('expert_in_bias', (E, F), ('expert', None))
      rows = jnp.einsum('NM,EMF->NEF', x, hidden) + bias[None]
      x, letters = jax.nn.sigmoid(rows), 'NEF,EFV->NEV'
    else:
      letters = 'NF,EFV->NEV'
    kernel = self._weights('expert_out', (E, F or M, V), ('expert', None, None))
    bias = self._weights('expert_out_bias', (E, V), ('expert', None))
    return jnp.einsum(letters, x, kernel) + bias[None]

  def _gate(self, x: Float32[Array, 'N M']) -> Logits:
    c = self.config
    if c.gate_hidden:
      shape = (x.shape[-1], c.gate_hidden)
      hidden = self._weights('gate_in', shape, (None, None))
      bias = self._weights('gate_in_bias', shape[1:], (None,))
      x = jax.nn.sigmoid(x @ hidden + bias[None])
    shape = (x.shape[-1], c.num_experts)
    kernel = self._weights('gate_out', shape, (None, None), zero=True)
    bias = self._weights('gate_out_bias', shape[1:], (None,), zero=True)
    return x @ kernel + bias[None]

  @staticmethod
  def class_scores(outputs: AdaptiveOutputs) -> Targets:
    """The larger, the likelier the class."""
    return outputs.prediction

  def losses(
    self, outputs: AdaptiveOutputs, batch: Mapping[str, Array]
  ) -> Float32[Array, 'N 1']:
    """Every case's error; its target is 1 at its class, 0 elsewhere."""
    classes = batch['targets'][:, 0]
    targets = jax.nn.one_hot(classes, self.config.vocab_size)
    loss = LOSSES[self.config.loss]
    found = loss(outputs.expert_outputs, outputs.gate_logits, targets)
    return found[:, None]

  @staticmethod
  def inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The arguments of a call that are in a batch."""
    return {'features': batch['features']}

  def example(self, tokens: Int[Array, 'N T']) -> dict[str, Array]:
    """The arguments of a call, of as many cases as there are rows."""
    shape = (len(tokens), *self.config.feature_shape)
    return {'features': jnp.zeros(shape, jnp.float32)}
