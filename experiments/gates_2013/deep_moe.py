"""The deep mixture of experts of 2013: gated layers on top of each other.

https://arxiv.org/abs/1312.4314: z = sum_i g_i(x) f_i(x) in every layer, with
f_i(x) = ReLU(W_i x + b_i) and a network g of its own whose softmax is the
gates, then a linear classifier. All experts are evaluated. A constraint
balances them: experts ahead of the mean by a margin sit out. The form of the
paper's equation could not be verified: this is the rule as later code and
summaries have it.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

NUM_CLASSES = 10  # of digits


def overused(totals, margin):
  """Whether each total exceeds the mean by more than `margin`; never all do.

  Args:
    totals: G_i, the gates of expert i summed over all examples so far, float32
      [E]. A constant added to all of them changes nothing.
    margin: The number of examples by which a total may exceed the mean; at
      least 0.
  """
  # No one is above the mean where all are equal, but for a rounded mean.
  return (totals - totals.mean() > margin) & (totals > totals.min())


def constrained_gates(logits, overused):
  """Softmax gates [B, E]: 0 for overused experts, those of others sum to 1.

  Overused experts get no gradient. To leave out their logits is to
  renormalise the gates, but for gates too small for float32 to divide by.
  """
  open_logits = jnp.where(overused[None], -jnp.inf, logits)
  return jax.nn.softmax(open_logits, axis=-1)


def moved(totals, mass):
  """The totals after a step, less their mean.

  Unlike a plain sum, the totals do not grow with the run, where float32
  would soon lose single gates.

  Args:
    totals: The totals before the step, [E].
    mass: The gates that the model used, summed over the step's examples, [E].
  """
  totals = totals + mass
  return totals - totals.mean(keepdims=True)


class GatedLayer(nn.Module):
  """A layer that computes z = sum_i g_i(x) f_i(x).

  Attributes:
    num_experts: E, the number of experts.
    hidden: F, the units of each expert, which is the layer's width.
    gate_hidden: The units of the gating network's hidden layer.
  """

  num_experts: int
  hidden: int
  gate_hidden: int

  @nn.compact
  def __call__(self, x, sit_out=None):
    """The outputs [B, F] for x [B, M], and the gates [B, E].

    Args:
      x: The input of gates and experts.
      sit_out: The experts whose gates are 0, bool [E]; None for none.
    """
    E, F = self.num_experts, self.hidden
    hidden = nn.relu(_dense(self.gate_hidden, 'gate_in')(x))
    logits = _dense(E, 'gate_out')(hidden)
    gates = jax.nn.softmax(logits)
    if sit_out is not None:
      gates = constrained_gates(logits, sit_out)
    w = self.param('w_in', _init(batch_axis=[0]), (E, x.shape[-1], F))
    b = self.param('b_in', nn.initializers.zeros, (E, F))
    outputs = nn.relu(jnp.einsum('BM,EMF->BEF', x, w) + b[None])
    return jnp.einsum('BE,BEF->BF', gates, outputs), gates


class DeepMoe(nn.Module):
  """A model from features to logits of classes.

  Attributes:
    num_experts: Number of experts in each gated layer.
    hidden: Number of units of each expert, by layer.
    gate_hidden: Number of hidden ReLUs of the gating network, by layer. The
      paper's gating networks could not be verified.
  """

  num_experts: tuple[int, ...]
  hidden: tuple[int, ...]
  gate_hidden: tuple[int, ...]

  @nn.compact
  def __call__(self, features, sit_out=None):
    """The logits [B, V], and the gates [B, E] of each layer.

    Args:
      features: Examples of any shape, float32 [B, ...].
      sit_out: The experts of each layer whose gates are 0; None for none.
    """
    x, gates = features.reshape(len(features), -1), []
    sizes = zip(self.num_experts, self.hidden, self.gate_hidden, strict=True)
    for i, layer_sizes in enumerate(sizes):
      layer = GatedLayer(*layer_sizes, name=f'layer_{i}')
      x, layer_gates = layer(x, None if sit_out is None else sit_out[i])
      gates.append(layer_gates)
    return _dense(NUM_CLASSES, 'classifier')(x), gates

  def no_totals(self):
    """The running totals of each layer before the first step."""
    return [jnp.zeros(E) for E in self.num_experts]


def _init(batch_axis=()):
  return nn.initializers.variance_scaling(
    1.0, 'fan_in', 'truncated_normal', batch_axis=batch_axis
  )


def _dense(size: int, name: str) -> nn.Dense:
  return nn.Dense(size, kernel_init=_init(), name=name)
