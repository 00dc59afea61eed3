"""Adaptive mixtures of local experts: where gated experts begin, in 1991.

Jacobs, Jordan, Nowlan and Hinton, https://doi.org/10.1162/neco.1991.3.1.79.
Small experts and a gate see the same features; three errors decide whether
the experts share every case or compete for it. A mixture of one expert with a
hidden layer is the paper's back-propagation network. Not here: its experiment
(`experiments/jacobs_table1.py`).

The gate has the part that a router has elsewhere. The paper's symbols: o_i is
an expert's output, p_i its mixing proportion (a softmax of the gate's logits),
d the target of a case.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers import parameters
from moe_jax.layers.shared import RULES
from moe_jax.models.base import Batch, TokenLosses
from moe_jax.models.feature_models import FeatureModel, FeatureModelOptions
from moe_jax.options import Options, above, at_least, nested, one_of, option
from moe_jax.partitioning import Rules
from moe_jax.routing import MoeAux, empty_aux
from moe_jax.shapes import Array, Float32


class AdaptiveOutputs(NamedTuple):
  """The outputs of a mixture for N cases.

  Attributes:
    expert_outputs: float32 [N, E, V], every expert's own o_i.
    gate_logits: float32 [N, E], the logits of the gate.
    gate_probs: float32 [N, E], the mixing proportions p_i.
    prediction: float32 [N, V], the blend sum_i p_i o_i.
  """

  expert_outputs: Array
  gate_logits: Array
  gate_probs: Array
  prediction: Array


class Gradients(NamedTuple):
  """The gradients of every case's error, as the formulas have them.

  Attributes:
    expert_outputs: float32 [N, E, V], by each expert's output.
    gate_logits: float32 [N, E], by the logits of the gate.
  """

  expert_outputs: Array
  gate_logits: Array


Outputs = Float32[Array, 'N E V']
Logits = Float32[Array, 'N E']
Targets = Float32[Array, 'N V']


def blend(outputs: Outputs, gate_probs: Logits) -> Targets:
  """The mixture's answer, sum_i p_i o_i."""
  return jnp.einsum('NEV,NE->NV', outputs, gate_probs)


def _distances(outputs: Outputs, targets: Targets) -> Logits:
  """The squared distance ||d - o_i||^2 of every case and expert."""
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
  """Equation 1.2, sum_i p_i ||d - o_i||^2: that of an expert drawn by p."""
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
  """The gradients of equation 1.1: every expert gets the error of the blend.

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


@dataclasses.dataclass(frozen=True)
class MixtureOptions(Options):
  """A mixture of experts and its error."""

  loss: str = option(
    'competitive',
    "Error that is minimised: 'cooperative' (equation 1.1), 'gated' (1.2) or "
    "'competitive' (1.3).",
    one_of(*LOSSES),
  )
  num_experts: int = option(4, 'Number E of experts.', at_least(1))
  expert_hidden: int = option(
    0, 'Hidden logistic units of an expert; 0: it is linear.', at_least(0)
  )
  gate_hidden: int = option(
    0, 'Hidden logistic units of the gate; 0: it is linear.', at_least(0)
  )
  expert_output: str = option(
    'softmax',
    "Function that an expert's outputs pass through. 'logistic' (the paper's, "
    "as far as its decision lines tell, of one output) and 'softmax' keep a "
    "linear expert's decision surface linear.",
    one_of('linear', 'logistic', 'softmax'),
  )
  init_scale: float = option(
    0.5,
    'Weights start uniform between minus and plus this number; the paper does '
    "not say. The gate's last layer starts at zero, so that all mixing "
    'proportions are equal, as they are there. At 0 experts would start alike '
    'and stay so.',
    above(0),
  )


@dataclasses.dataclass(frozen=True)
class AdaptiveOptions(FeatureModelOptions):
  """The adaptive mixture of 1991, a classifier; all of it is float32."""

  adaptive: MixtureOptions = nested(
    MixtureOptions(), 'Experts and gate of the mixture, and its error.'
  )

  def build(self, rules: Rules = RULES) -> 'AdaptiveMixture':
    """See `ModelOptions.build`."""
    del rules
    self.check_filled()
    return AdaptiveMixture(self)


class AdaptiveMixture(FeatureModel):
  """Experts and gate on the same features; dense, every expert runs.

  Attributes:
    options: What the model is.
  """

  options: AdaptiveOptions

  @nn.compact
  def __call__(
    self, features: Float32[Array, 'N *shape'], train: bool = False
  ) -> tuple[AdaptiveOutputs, MoeAux]:
    """The outputs of experts, gate and blend; `train` changes nothing."""
    del train
    c = self.options.adaptive
    x = features.reshape(features.shape[0], math.prod(features.shape[1:]))
    outputs = self._experts(x)  # [N, E, V]
    if c.expert_output == 'logistic':
      outputs = jax.nn.sigmoid(outputs)
    elif c.expert_output == 'softmax':
      outputs = jax.nn.softmax(outputs)
    logits = self._gate(x)  # [N, E]
    probs = jax.nn.softmax(logits)
    aux = jax.tree.map(lambda a: a[None], empty_aux(c.num_experts, 1))
    prediction = blend(outputs, probs)
    return AdaptiveOutputs(outputs, logits, probs, prediction), aux

  def _layer(self, name, role, shape, axes, zero=False) -> tuple[Array, Array]:
    """A kernel and the bias of its outputs, float32."""
    scale = self.options.adaptive.init_scale

    def uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -scale, scale)

    start = nn.initializers.zeros if zero else uniform
    kernel = parameters.boxed(start, axes, role=role, form='kernel')
    bias_axes = (*axes[:-2], axes[-1])
    bias = parameters.boxed(start, bias_axes, role=role, form='bias')
    bias_shape = (*shape[:-2], shape[-1])
    return (
      self.param(name, kernel, shape, jnp.float32),
      self.param(f'{name}_bias', bias, bias_shape, jnp.float32),
    )

  def _experts(self, x: Float32[Array, 'N M']) -> Outputs:
    c, V = self.options.adaptive, self.vocab_size
    M, E, F = x.shape[-1], c.num_experts, c.expert_hidden
    axes = ('expert', None, None)
    if F:
      kernel, bias = self._layer('expert_in', 'expert', (E, M, F), axes)
      rows = jnp.einsum('NM,EMF->NEF', x, kernel) + bias[None]
      x, letters = jax.nn.sigmoid(rows), 'NEF,EFV->NEV'
    else:
      letters = 'NF,EFV->NEV'
    kernel, bias = self._layer('expert_out', 'expert', (E, F or M, V), axes)
    return jnp.einsum(letters, x, kernel) + bias[None]

  def _gate(self, x: Float32[Array, 'N M']) -> Logits:
    c, axes = self.options.adaptive, (None, None)
    if c.gate_hidden:
      shape = (x.shape[-1], c.gate_hidden)
      kernel, bias = self._layer('gate_in', 'gate', shape, axes)
      x = jax.nn.sigmoid(x @ kernel + bias[None])
    shape = (x.shape[-1], c.num_experts)
    kernel, bias = self._layer('gate_out', 'gate', shape, axes, zero=True)
    return x @ kernel + bias[None]

  @property
  def moes(self) -> tuple[None]:
    """One layer, whose experts are no sparse feed-forward."""
    return (None,)

  @nn.nowrap
  def class_scores(self, outputs: AdaptiveOutputs) -> Targets:
    """A number for each class: the larger, the likelier."""
    return outputs.prediction

  @nn.nowrap
  def loss(self, outputs: AdaptiveOutputs, batch: Batch) -> TokenLosses:
    """Every case's error; its target is 1 at its class, 0 elsewhere."""
    targets = jax.nn.one_hot(batch['targets'][:, 0], self.vocab_size)
    error = LOSSES[self.options.adaptive.loss]
    errors = error(outputs.expert_outputs, outputs.gate_logits, targets)
    return TokenLosses(errors[:, None])

  @nn.nowrap
  def inputs(self, batch: Batch) -> dict[str, Array]:
    """See `Model.inputs`."""
    return {'features': batch['features']}
