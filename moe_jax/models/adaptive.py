"""Adaptive mixtures of local experts, the first gated experts, of 1991.

Jacobs, Jordan, Nowlan and Hinton, https://doi.org/10.1162/neco.1991.3.1.79.
Small experts and a gate see the same features; the gate is what is called a
router elsewhere. A mixture of one expert with a hidden layer is the paper's
back-propagation network. Not here: its three errors (`adaptive_errors.py`) and
the paper's experiment (`experiments/jacobs_table1.py`).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers import parameters
from moe_jax.layers.shared import RULES
from moe_jax.models.adaptive_errors import (
  LOSSES,
  Logits,
  Outputs,
  Targets,
  blend,
)
from moe_jax.models.base import Batch, TokenLosses
from moe_jax.models.feature_models import FeatureModel, FeatureModelOptions
from moe_jax.options import Options, above, at_least, nested, one_of, option
from moe_jax.partitioning import Rules
from moe_jax.routing import MoeAux, empty_aux
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float32


class AdaptiveOutputs(NamedTuple):
  """The outputs of a mixture for N cases.

  Attributes:
    expert_outputs: float32 [N, E, V], the output o_i of each expert.
    gate_logits: float32 [N, E], the logits of the gate.
    gate_probs: float32 [N, E], the mixing proportions p_i.
    prediction: float32 [N, V], the blend sum_i p_i o_i.
  """

  expert_outputs: Array
  gate_logits: Array
  gate_probs: Array
  prediction: Array


@dataclasses.dataclass(frozen=True)
class MixtureOptions(Options):
  """A mixture of experts and its error."""

  loss: str = option(
    'competitive',
    "Error that the mixture of 1991 minimises: 'cooperative' (equation 1.1 of "
    "the paper), 'gated' (1.2) or 'competitive' (1.3).",
    one_of(*LOSSES),
  )
  num_experts: int = option(
    4, 'Number E of experts of the adaptive mixture.', at_least(1)
  )
  expert_hidden: int = option(
    0,
    'Number of hidden logistic units of each expert of the adaptive mixture; '
    '0: experts are linear.',
    at_least(0),
  )
  gate_hidden: int = option(
    0,
    'Number of hidden logistic units of the gate of the adaptive mixture; 0: '
    'the gate is linear.',
    at_least(0),
  )
  expert_output: str = option(
    'softmax',
    "Function on an expert's outputs. 'logistic' (the paper's, for one output, "
    "as far as its decision lines tell) and 'softmax' keep a linear expert's "
    'decision surface linear.',
    one_of('linear', 'logistic', 'softmax'),
  )
  init_scale: float = option(
    0.5,
    'Weights of the adaptive mixture are drawn uniformly between minus and '
    'plus this number, which the paper does not state. The last layer of the '
    'gate starts at zero, so that mixing proportions start equal, as the '
    "paper's do.",
    above(0),
  )


@dataclasses.dataclass(frozen=True)
class AdaptiveOptions(FeatureModelOptions):
  """The options of the adaptive mixture of 1991, a classifier in float32."""

  adaptive: MixtureOptions = nested(
    MixtureOptions(), 'Experts and gate of the mixture, and its error.'
  )

  def least_parameters(self) -> int:
    """See `ModelOptions.least_parameters`."""
    c, M, V = self.adaptive, self.num_features, self.vocab_size
    F, gate = c.expert_hidden, c.gate_hidden
    expert_values = F * (M + V) if F else M * V
    return c.num_experts * (expert_values + (gate or M)) + gate * M

  def build(self, rules: Rules = RULES) -> 'AdaptiveMixture':
    """See `ModelOptions.build`."""
    del rules
    self.check_filled()
    return AdaptiveMixture(self)


class AdaptiveMixture(FeatureModel):
  """Experts and a gate that read the same features; every expert runs.

  Attributes:
    options: The options of the model.
  """

  options: AdaptiveOptions

  @nn.compact
  @checked
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

    init = nn.initializers.zeros if zero else uniform
    kernel = parameters.boxed(init, axes, role=role, form='kernel')
    bias_axes = (*axes[:-2], axes[-1])
    bias = parameters.boxed(init, bias_axes, role=role, form='bias')
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
      hidden = jnp.einsum('NM,EMF->NEF', x, kernel) + bias[None]
      x, equation = jax.nn.sigmoid(hidden), 'NEF,EFV->NEV'
    else:
      equation = 'NF,EFV->NEV'
    kernel, bias = self._layer('expert_out', 'expert', (E, F or M, V), axes)
    return jnp.einsum(equation, x, kernel) + bias[None]

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
    """One layer without sparse experts, as all of its experts run."""
    return (None,)

  @nn.nowrap
  def class_scores(self, outputs: AdaptiveOutputs) -> Targets:
    """See `FeatureModel.class_scores`; they are the outputs of the blend."""
    return outputs.prediction

  @nn.nowrap
  def loss(self, outputs: AdaptiveOutputs, batch: Batch) -> TokenLosses:
    """Every case's error; its target is 1 at its class, 0 elsewhere."""
    targets = jax.nn.one_hot(batch['targets'][:, 0], self.vocab_size)
    error = LOSSES[self.options.adaptive.loss]
    errors = error(outputs.expert_outputs, outputs.gate_logits, targets)
    return TokenLosses(errors[:, None])

  @nn.nowrap
  def inputs(self, batch: Batch) -> dict[str, Any]:
    """See `Model.inputs`."""
    features = batch['features']
    real = batch['segment_ids'] > 0  # [B, 1]
    real = real.reshape(-1, *(1,) * (features.ndim - 1))
    return {'features': jnp.where(real, features, 0)}
