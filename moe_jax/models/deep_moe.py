"""The deep mixture of experts: gated layers on top of each other.

https://arxiv.org/abs/1312.4314: z = sum_i g_i(x) f_i(x) in every layer, with
f_i(x) = ReLU(W_i x + b_i) and a network g of its own whose softmax is the
gates, then a linear classifier. All experts are evaluated. Not here: the
balancing constraint (`moe_jax.routing.running_totals`).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from moe_jax import routing
from moe_jax.layers import parameters
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.layers.shared import RULES, Numerics, Shared
from moe_jax.models.base import Batch, TokenLosses
from moe_jax.models.feature_models import FeatureModel, FeatureModelOptions
from moe_jax.models.model_options import RunShape
from moe_jax.options import Check, Options, at_least, each, nested, option
from moe_jax.partitioning import Rules
from moe_jax.routing import MoeAux, running_totals
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Leaf

TOTALS, STEPS = 'totals', 'steps'


@dataclasses.dataclass(frozen=True)
class GatedLayersOptions(Options):
  """Gated layers, with a size for each, and their balancing constraint."""

  num_experts: tuple[int, ...] = option(
    (4, 4), 'Number E of experts in each layer.', each(at_least(1))
  )
  hidden: tuple[int, ...] = option(
    (100, 100),
    'Units of each expert in each layer, the width of the layer.',
    each(at_least(1)),
  )
  gate_hidden: tuple[int, ...] = option(
    (50, 50),
    "Units of the hidden layer, of ReLUs, of each layer's gating network. That "
    'it has one layer, and of which units, could not be verified.',
    each(at_least(1)),
  )
  margin: float = option(
    32.0,
    "Number of examples by which an expert's running total may be above the "
    "mean before it sits out. The paper's could not be verified. An expert "
    'passes it by up to a batch, as totals move once a step.',
    at_least(0),
    when={'balance_steps': Check('is not 0', lambda steps: steps != 0)},
  )
  balance_steps: int = option(
    0,
    'Number of optimizer steps for which the constraint is in force; 0: never; '
    '-1: always. It is of training alone.',
    at_least(-1),
  )

  def problems(self) -> Iterator[str]:
    """Every layer has its sizes."""
    if not self.num_experts:
      yield 'num_experts=() names no layer; give each its number of experts'
    for name in ('hidden', 'gate_hidden'):
      if len(getattr(self, name)) != len(self.num_experts):
        yield (
          f'{name}={getattr(self, name)} and num_experts={self.num_experts} '
          'must have one size a layer each'
        )


@dataclasses.dataclass(frozen=True)
class DeepMoeOptions(FeatureModelOptions):
  """The deep mixture of 2013, a classifier; all of it is float32."""

  numerics: Numerics = nested(
    Numerics(), 'Types of numbers, and how parameters start.'
  )
  deep_moe: GatedLayersOptions = nested(
    GatedLayersOptions(), 'Gated layers, and their balancing constraint.'
  )

  def problems(self) -> Iterator[str]:
    """It has one type of numbers."""
    yield from super().problems()
    for name in ('dtype', 'param_dtype'):
      if (value := getattr(self.numerics, name)) != 'float32':
        yield (
          f"numerics.{name}={value!r} has no effect with kind='deep_moe', all "
          'of which is float32'
        )

  def problems_in(self, run: RunShape) -> Iterator[str]:
    """See `ModelOptions.problems_in`; the constraint ends within the run."""
    early = self.deep_moe.balance_steps
    if early > run.total_steps:
      yield (
        f'model.deep_moe.balance_steps={early} > total_steps='
        f'{run.total_steps}: the constraint would never be lifted; lower it, '
        'or say so with -1'
      )

  def build(self, rules: Rules = RULES) -> 'DeepMoe':
    """See `ModelOptions.build`."""
    del rules
    self.check_filled()
    return DeepMoe(self)

  def shrunk(self) -> Self:
    """See `Options.shrunk`."""
    small = super().shrunk()
    steps = min(small.deep_moe.balance_steps, 1)
    layers = dataclasses.replace(small.deep_moe, balance_steps=steps)
    return dataclasses.replace(small, deep_moe=layers)


@dataclasses.dataclass(frozen=True)
class GatedLayerConfig:
  """One gated layer.

  Attributes:
    num_experts: E, the number of experts.
    hidden: F, the units of each expert, which is the layer's width.
    gate_hidden: The units of the gating network's hidden layer.
    margin: The same as in `GatedLayersOptions`.
    largest: The model's largest E, to which loads are padded.
    shared: What the layers of the model share.
  """

  num_experts: int
  hidden: int
  gate_hidden: int
  margin: float
  largest: int
  shared: Shared


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
        ROUTER_STATE, TOTALS, jnp.zeros, (c.num_experts,), jnp.float32
      )
      out = running_totals.overused(totals.value, c.margin) & balanced
      gate = running_totals.constrained_gates(logits, out)
    self.sow('intermediates', 'gates', gate)
    shape, axes = (
      (c.num_experts, x.shape[-1], c.hidden),
      ('expert', 'expert_mlp'),
    )
    init = parameters.kernel(
      c.shared, ('expert', 'embed', 'expert_mlp'), role='expert'
    )
    w = self.param('w_in', init, shape)
    b = self.param('b_in', parameters.bias(axes, role='expert'), shape[::2])
    experts = nn.relu(jnp.einsum('BM,EMF->BEF', x, w) + b[None])
    stats = routing.mixture_stats(
      gate[None], logits[None], mask[None], c.largest
    )
    aux = routing.empty_aux(c.largest, 1)._replace(stats=stats)
    return jnp.einsum('BE,BEF->BF', gate, experts), aux

  def _gate_logits(self, x):
    c = self.config
    dense = functools.partial(_dense, c.shared, 'gate')
    hidden = dense(c.gate_hidden, ('embed', 'mlp'), 'gate_in')(x)
    axes = ('mlp', 'expert_choice')
    return dense(c.num_experts, axes, 'gate_out')(nn.relu(hidden))


class DeepMoe(FeatureModel):
  """Features to the logits of classes.

  Attributes:
    options: What the model is.
  """

  options: DeepMoeOptions

  @nn.compact
  def __call__(
    self,
    features: Float[Array, 'B ...'],
    segment_ids: Int[Array, 'B 1'] | None = None,
    train: bool = False,
  ) -> tuple[Float32[Array, 'B 1 V'], MoeAux]:
    """Returns logits and the layers' aux, every leaf [L, ...].

    Args:
      features: Examples of any shape.
      segment_ids: 0 for padding. Default: there is none.
      train: Puts the balancing constraint in force, while it is.
    """
    x = features.reshape(len(features), -1).astype(jnp.float32)
    if segment_ids is None:
      segment_ids = jnp.ones((len(x), 1), jnp.int32)
    mask, balanced = segment_ids[:, 0] > 0, self._balanced(train)
    auxes = []
    for name, layer in self._layers().items():
      x, aux = GatedLayer(layer, name=name)(x, mask, balanced)
      auxes.append(aux)
    classifier = _dense(
      self._shared, 'head', self.vocab_size, ('embed', 'vocab'), 'classifier'
    )
    aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)
    return classifier(x)[:, None], aux

  def _balanced(self, train: bool) -> Bool[Array, ''] | None:
    """Whether the constraint is in force; None where it never is."""
    if not self.keeps_router_state:
      return None
    early = self.options.deep_moe.balance_steps
    steps = self.variable(ROUTER_STATE, STEPS, jnp.zeros, (), jnp.int32)
    return ((steps.value < early) | (early < 0)) & train

  @property
  def _shared(self) -> Shared:
    return Shared(self.options.numerics)

  @nn.nowrap
  def _layers(self) -> dict[str, GatedLayerConfig]:
    """Every layer by its name in the trees."""
    c = self.options.deep_moe
    sizes = zip(c.num_experts, c.hidden, c.gate_hidden, strict=True)
    largest = max(c.num_experts)
    return {
      f'layer_{i}': GatedLayerConfig(*own, c.margin, largest, self._shared)
      for i, own in enumerate(sizes)
    }

  @property
  def moes(self) -> tuple[None, ...]:
    """Its gated layers are no sparse feed-forwards."""
    return (None,) * len(self.options.deep_moe.num_experts)

  @property
  def keeps_router_state(self) -> bool:
    """Whether there are running totals."""
    return self.options.deep_moe.balance_steps != 0

  @nn.nowrap
  def move_router_state(
    self,
    router_state: dict[str, Any],
    load: Float32[Array, 'L E'],
    rate: Leaf | None = None,
  ) -> dict[str, Any]:
    """Totals and step count after a step.

    Args:
      router_state: The collection before the step.
      load: The gates of the whole batch, summed, of every layer.
      rate: It has no meaning here.
    """
    del rate
    if not router_state:
      return router_state
    moved = {STEPS: router_state[STEPS] + 1}
    for row, (name, layer) in zip(load, self._layers().items(), strict=True):
      totals = router_state[name][TOTALS]
      mass = row[: layer.num_experts]
      moved[name] = {TOTALS: running_totals.moved(totals, mass)}
    return moved

  @nn.nowrap
  def inputs(self, batch: Batch) -> dict[str, Array]:
    """See `Model.inputs`."""
    return {key: batch[key] for key in ('features', 'segment_ids')}

  @nn.nowrap
  def class_scores(
    self, outputs: Float32[Array, 'B 1 V']
  ) -> Float32[Array, 'B V']:
    """A number for each class: the larger, the likelier."""
    return outputs[:, 0]

  @nn.nowrap
  def loss(self, outputs: Float32[Array, 'B 1 V'], batch: Batch) -> TokenLosses:
    """The cross-entropy of each example's class, in nats."""
    return TokenLosses(
      optax.softmax_cross_entropy_with_integer_labels(outputs, batch['targets'])
    )


def _dense(
  shared: Shared, role: str, size: int, axes: tuple[str, str], name: str
) -> nn.Dense:
  return nn.Dense(
    size,
    kernel_init=parameters.kernel(shared, axes, role=role),
    bias_init=parameters.bias(axes[1:], role=role),
    name=name,
  )
