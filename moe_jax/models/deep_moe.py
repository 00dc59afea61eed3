"""The deep mixture of experts: gated layers on top of each other.

https://arxiv.org/abs/1312.4314: z = sum_i g_i(x) f_i(x) in every layer, with
f_i(x) = ReLU(W_i x + b_i) and a network g of its own whose softmax is the
gates, then a linear classifier. All experts are evaluated. Not here: how a
config becomes a `DeepMoeConfig` (`build.py`), and the balancing constraint
(`moe_jax.routing.running_totals`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from moe_jax import routing
from moe_jax.layers.initializers import Init, zeros
from moe_jax.models.router_state import COLLECTION
from moe_jax.routing import MoeAux, running_totals
from moe_jax.shapes import Array, Bool, Float, Float32, Int

TOTALS, STEPS = 'totals', 'steps'


@dataclasses.dataclass(frozen=True)
class GatedLayerConfig:
  """One mixture.

  Attributes:
    num_experts: E.
    hidden: F, how many units each expert has; the layer's width.
    gate_hidden: Units of the gating network's hidden layer, of ReLUs. That it
      has one layer, and of which units, could not be verified.
    margin: See `DeepMoeConfig`.
    largest: The model's largest E, to which loads are padded.
    init: How kernels start.
  """

  num_experts: int
  hidden: int
  gate_hidden: int
  margin: float
  largest: int
  init: Init


@dataclasses.dataclass(frozen=True)
class DeepMoeConfig:
  """A classifier of gated layers; all of it is float32.

  Attributes:
    vocab_size: How many classes.
    feature_shape: Of one example, flattened for the first layer.
    num_experts: E of each layer.
    hidden: Of each layer; see `GatedLayerConfig`.
    gate_hidden: Of each layer.
    margin: By how many examples an expert's running total may be above the
      mean before it sits out. The paper's could not be verified. An expert
      passes it by up to a batch, as totals move once a step.
    balance_steps: For how many optimizer steps the constraint is in force;
      0: never, -1: always. It is of training alone.
    init: How kernels start.

  Raises:
    ValueError: A size is not positive, or there is not one for each layer.
  """

  vocab_size: int
  feature_shape: tuple[int, ...]
  num_experts: tuple[int, ...] = (4, 4)
  hidden: tuple[int, ...] = (100, 100)
  gate_hidden: tuple[int, ...] = (50, 50)
  margin: float = 32.0
  balance_steps: int = 0
  init: Init = Init()
  moe: ClassVar[None] = None  # no sparse feed-forward,
  stacks: ClassVar[tuple[()]] = ()  # and no blocks to have it

  def __post_init__(self):
    for name in ('num_experts', 'hidden', 'gate_hidden', 'feature_shape'):
      sizes = getattr(self, name)
      if not sizes or min(sizes) < 1:
        raise ValueError(f'deep_moe: {name}={sizes} must be positive sizes')
    layers = len(self.num_experts)
    for name in ('hidden', 'gate_hidden'):
      if len(getattr(self, name)) != layers:
        raise ValueError(
          f'deep_moe: {name}={getattr(self, name)} and num_experts='
          f'{self.num_experts} must have one size a layer each'
        )
    if self.vocab_size < 1:
      raise ValueError(f'vocab_size={self.vocab_size} classes; needs 1 or more')
    if not self.margin >= 0 or math.isinf(self.margin):
      raise ValueError(
        f'deep_moe: margin={self.margin} must be finite and at least 0'
      )
    if self.balance_steps < -1:
      raise ValueError(
        f'deep_moe: balance_steps={self.balance_steps} not in [-1, ...]'
      )

  @property
  def sparse(self) -> tuple[bool, ...]:
    """A flag a layer: all have gates."""
    return (True,) * len(self.num_experts)

  @property
  def layers(self) -> dict[str, GatedLayerConfig]:
    """Every layer by its name in the trees."""
    sizes = zip(self.num_experts, self.hidden, self.gate_hidden, strict=True)
    largest = max(self.num_experts)
    return {
      f'layer_{i}': GatedLayerConfig(*own, self.margin, largest, self.init)
      for i, own in enumerate(sizes)
    }

  @property
  def keeps_router_state(self) -> bool:
    """Whether there are running totals."""
    return self.balance_steps != 0

  def moved(
    self, router_state: dict[str, Any], load: Float32[Array, 'L E']
  ) -> dict[str, Any]:
    """Totals and step count after a step.

    Args:
      router_state: Before it.
      load: Of every layer, the gates of the whole batch summed.
    """
    made = {STEPS: router_state[STEPS] + 1}
    for row, (name, layer) in zip(load, self.layers.items(), strict=True):
      totals = router_state[name][TOTALS]
      mass = row[: layer.num_experts]
      made[name] = {TOTALS: running_totals.moved(totals, mass)}
    return made


class GatedLayer(nn.Module):
  """z = sum_i g_i(x) f_i(x).

  Sows the gates, [B, E], as `gates` among the intermediates.
  """

  config: GatedLayerConfig

  @nn.compact
  def __call__(
    self,
    x: Float32[Array, 'B M'],
    mask: Bool[Array, ' B'],
    balanced: Bool[Array, ''] | None = None,
  ) -> tuple[Float32[Array, 'B F'], MoeAux]:
    """Applies the layer.

    Args:
      x: What gates and experts see.
      mask: False for padding, which adds to no statistic.
      balanced: Whether the constraint is in force; None: it never is, and the
        layer keeps no totals.
    """
    c = self.config
    logits = self._gate_logits(x)
    gate = jax.nn.softmax(logits)
    if balanced is not None:
      totals = self.variable(
        COLLECTION, TOTALS, jnp.zeros, (c.num_experts,), jnp.float32
      )
      out = running_totals.overused(totals.value, c.margin) & balanced
      gate = running_totals.constrained_gates(logits, out)
    self.sow('intermediates', 'gates', gate)
    shape = (c.num_experts, x.shape[-1], c.hidden)
    w = self.param(
      'w_in', c.init.kernel(('expert', 'embed', 'expert_mlp')), shape
    )
    b = self.param('b_in', zeros(('expert', 'expert_mlp')), shape[::2])
    experts = nn.relu(jnp.einsum('BM,EMF->BEF', x, w) + b[None])
    stats = routing.mixture_stats(
      gate[None], logits[None], mask[None], c.largest
    )
    aux = routing.empty_aux(c.largest, 1)._replace(stats=stats)
    return jnp.einsum('BE,BEF->BF', gate, experts), aux

  def _gate_logits(self, x):
    c = self.config
    hidden = _dense(c.init, c.gate_hidden, ('embed', 'mlp'), 'gate_in')(x)
    axes = ('mlp', 'expert_choice')
    return _dense(c.init, c.num_experts, axes, 'gate_out')(nn.relu(hidden))


class DeepMoe(nn.Module):
  """Features to the logits of classes."""

  config: DeepMoeConfig

  @nn.compact
  def __call__(
    self,
    features: Float[Array, 'B ...'],
    segment_ids: Int[Array, 'B 1'] | None = None,
    train: bool = False,
  ) -> tuple[Float32[Array, 'B 1 V'], MoeAux]:
    """Returns logits and the layers' aux, every leaf [L, ...].

    Args:
      features: Of any shape.
      segment_ids: 0 for padding. Default: there is none.
      train: Puts the balancing constraint in force, while it is.
    """
    c = self.config
    x = features.reshape(len(features), -1).astype(jnp.float32)
    if segment_ids is None:
      segment_ids = jnp.ones((len(x), 1), jnp.int32)
    mask, balanced = segment_ids[:, 0] > 0, self._balanced(train)
    found = []
    for name, layer in c.layers.items():
      x, aux = GatedLayer(layer, name=name)(x, mask, balanced)
      found.append(aux)
    classifier = _dense(c.init, c.vocab_size, ('embed', 'vocab'), 'classifier')
    aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return classifier(x)[:, None], aux

  def _balanced(self, train: bool) -> Bool[Array, ''] | None:
    """Whether the constraint is in force; None where it never is."""
    c = self.config
    if not c.keeps_router_state:
      return None
    steps = self.variable(COLLECTION, STEPS, jnp.zeros, (), jnp.int32)
    early = (steps.value < c.balance_steps) | (c.balance_steps < 0)
    return early & train

  @staticmethod
  def inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The arguments of a call that are in a batch."""
    return {key: batch[key] for key in ('features', 'segment_ids')}

  @nn.nowrap
  def example(self, tokens: Int[Array, 'B T']) -> dict[str, Array]:
    """The arguments of a call that initialises as many rows."""
    shape = (len(tokens), *self.config.feature_shape)
    return {'features': jnp.zeros(shape, jnp.float32)}

  @staticmethod
  def class_scores(outputs: Float32[Array, 'B 1 V']) -> Float32[Array, 'B V']:
    """The larger, the likelier the class."""
    return outputs[:, 0]

  @staticmethod
  def losses(
    outputs: Float32[Array, 'B 1 V'], batch: Mapping[str, Array]
  ) -> Float32[Array, 'B 1']:
    """The cross-entropy of each example's class, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(
      outputs, batch['targets']
    )


def _dense(init: Init, size: int, axes: tuple[str, str], name: str) -> nn.Dense:
  return nn.Dense(
    size,
    kernel_init=init.kernel(axes),
    bias_init=zeros(axes[1:]),
    name=name,
  )
