"""The deep mixture of experts of 2013: gated layers on top of each other.

https://arxiv.org/abs/1312.4314: z = sum_i g_i(x) f_i(x) in every layer, with
f_i(x) = ReLU(W_i x + b_i) and a network g of its own whose softmax is the
gates, then a linear classifier. All experts are evaluated. Not here: the rule
of the balancing constraint (`moe_jax.routing.running_totals`).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import routing
from moe_jax.layers import parameters
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.layers.shared import RULES, Numerics, Shared
from moe_jax.models.base import Batch, TokenLosses, counted
from moe_jax.models.feature_models import FeatureModel, FeatureModelOptions
from moe_jax.models.model_options import RunShape
from moe_jax.options import (
  Check,
  Options,
  at_least,
  each,
  nested,
  no_effect,
  option,
)
from moe_jax.partitioning import Rules
from moe_jax.routing import MoeAux, running_totals
from moe_jax.routing.rows import without_nan
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Bool, Float, Float32, Int

TOTALS, STEPS = 'totals', 'steps'


@dataclasses.dataclass(frozen=True)
class GatedLayersOptions(Options):
  """The options of gated layers, with sizes for each, and their balancing."""

  num_experts: tuple[int, ...] = option(
    (4, 4),
    'Number E of experts in each gated layer, one number a layer.',
    each(at_least(1)),
  )
  hidden: tuple[int, ...] = option(
    (100, 100),
    'Number of units of each expert in a gated layer, which is the width of '
    'the layer; one number a layer.',
    each(at_least(1)),
  )
  gate_hidden: tuple[int, ...] = option(
    (50, 50),
    'Number of ReLUs in the hidden layer of a gating network, one number for '
    "each gated layer. The paper's gating networks could not be verified.",
    each(at_least(1)),
  )
  margin: float = option(
    32.0,
    'Margin of the balancing constraint, in examples: an expert whose running '
    'total of gates is above the mean by more gets gate 0. Totals are updated '
    'once a step, so an expert may pass the margin by up to a batch. The '
    "paper's margin could not be verified.",
    at_least(0),
    when={'balance_steps': Check('is not 0', lambda steps: steps != 0)},
  )
  balance_steps: int = option(
    0,
    'Number of optimizer steps, from the first, for which the balancing '
    'constraint is in force in training; 0: never; -1: always.',
    at_least(-1),
  )

  def problems(self) -> Iterator[str]:
    """The problem of layers without sizes of their own."""
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
  """The options of the deep mixture of 2013, a classifier in float32."""

  numerics: Numerics = nested(
    Numerics(), 'Types of numbers (float32 only), and initialisation.'
  )
  deep_moe: GatedLayersOptions = nested(
    GatedLayersOptions(), 'Sizes of the gated layers, and their balancing.'
  )

  def problems(self) -> Iterator[str]:
    """The problems of numbers that are not float32, and of codes."""
    yield from super().problems()
    if not self.numerics.kernels.is_plain:
      yield no_effect(
        'numerics.kernels.name',
        self.numerics.kernels.name,
        "with kind='deep_moe'",
      )
    for name in ('dtype', 'param_dtype'):
      if (value := getattr(self.numerics, name)) != 'float32':
        yield (
          f"numerics.{name}={value!r} has no effect with kind='deep_moe', all "
          'of which is float32'
        )

  def problems_in(self, run: RunShape) -> Iterator[str]:
    """See `ModelOptions.problems_in`; the constraint ends within the run."""
    balance_steps = self.deep_moe.balance_steps
    if balance_steps > run.total_steps:
      yield (
        f'model.deep_moe.balance_steps={balance_steps} > total_steps='
        f'{run.total_steps}: the constraint would never be lifted; lower it, '
        'or say so with -1'
      )

  def least_parameters(self) -> int:
    """See `ModelOptions.least_parameters`."""
    c, M, total = self.deep_moe, self.num_features, 0
    for E, F, gate in zip(c.num_experts, c.hidden, c.gate_hidden):
      total, M = total + E * M * F + gate * (M + E), F
    return total + M * self.vocab_size

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


class GatedLayer(nn.Module):
  """A layer that computes z = sum_i g_i(x) f_i(x).

  It sows the gates, [B, E], as `gates` among the intermediates.

  Attributes:
    num_experts: E, the number of experts.
    hidden: F, the units of each expert, which is the layer's width.
    gate_hidden: The units of the gating network's hidden layer.
    margin: The same as in `GatedLayersOptions`.
    largest: The model's largest E, to which loads are padded.
    shared: The settings that all layers of the model share.
  """

  num_experts: int
  hidden: int
  gate_hidden: int
  margin: float
  largest: int
  shared: Shared

  @nn.compact
  def __call__(
    self,
    x: Float32[Array, 'B M'],
    mask: Bool[Array, ' B'],
    balanced: Bool[Array, ''] | None = None,
  ) -> tuple[Float32[Array, 'B F'], MoeAux]:
    """Applies the layer.

    Args:
      x: The input of gates and experts.
      mask: False for padding, which adds to no statistic.
      balanced: Whether the balancing constraint is in force; None: it never is,
        and the layer keeps no totals.
    """
    logits = self._gate_logits(x)
    gate = jax.nn.softmax(logits)
    if balanced is not None:
      totals = self.variable(
        ROUTER_STATE, TOTALS, jnp.zeros, (self.num_experts,), jnp.float32
      )
      overused = running_totals.overused(totals.value, self.margin) & balanced
      gate = running_totals.constrained_gates(logits, overused)
    self.sow('intermediates', 'gates', gate)
    shape = (self.num_experts, x.shape[-1], self.hidden)
    axes = ('expert', 'embed', 'expert_mlp')
    init = parameters.kernel(self.shared, axes, role='expert')
    w = self.param('w_in', init, shape)
    init = parameters.bias(axes[::2], role='expert')
    b = self.param('b_in', init, shape[::2])
    expert_outputs = nn.relu(jnp.einsum('BM,EMF->BEF', x, w) + b[None])
    stats = routing.mixture_stats(
      gate[None], logits[None], mask[None], self.largest
    )
    aux = routing.empty_aux(self.largest, 1)._replace(stats=stats)
    return jnp.einsum('BE,BEF->BF', gate, expert_outputs), aux

  def _gate_logits(self, x):
    dense = functools.partial(_dense, self.shared, 'gate')
    hidden = dense(self.gate_hidden, ('embed', 'mlp'), 'gate_in')(x)
    axes = ('mlp', 'expert_choice')
    return dense(self.num_experts, axes, 'gate_out')(nn.relu(hidden))


class DeepMoe(FeatureModel):
  """A model from features to logits of classes.

  Attributes:
    options: The options of the model.
  """

  options: DeepMoeOptions

  @nn.compact
  @checked
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
      train: Whether the balancing constraint applies, for its first steps.
    """
    x = features.reshape(len(features), -1).astype(jnp.float32)
    mask, balanced = jnp.ones(len(x), bool), self._balanced(train)
    if segment_ids is not None:
      mask = segment_ids[:, 0] > 0
      x = without_nan(mask, x)
    c, shared = self.options.deep_moe, Shared(self.options.numerics)
    sizes = zip(c.num_experts, c.hidden, c.gate_hidden, strict=True)
    common, auxes = (c.margin, max(c.num_experts), shared), []
    for i, layer_sizes in enumerate(sizes):
      layer = GatedLayer(*layer_sizes, *common, name=f'layer_{i}')
      x, aux = layer(x, mask, balanced)
      auxes.append(aux)
    classifier = _dense(
      shared, 'head', self.vocab_size, ('embed', 'vocab'), 'classifier'
    )
    aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)
    return classifier(x)[:, None], aux

  def _balanced(self, train: bool) -> Bool[Array, ''] | None:
    """Whether the constraint is in force; None where it never is."""
    if not self.keeps_router_state:
      return None
    balance_steps = self.options.deep_moe.balance_steps
    steps = self.variable(ROUTER_STATE, STEPS, jnp.zeros, (), jnp.int32)
    return ((steps.value < balance_steps) | (balance_steps < 0)) & train

  @property
  def moes(self) -> tuple[None, ...]:
    """None for every gated layer, as all of its experts run."""
    return (None,) * len(self.options.deep_moe.num_experts)

  @property
  def keeps_router_state(self) -> bool:
    """Whether there are running totals for the balancing constraint."""
    return self.options.deep_moe.balance_steps != 0

  @nn.nowrap
  def move_router_state(self, router_state, load, rate=None):
    """See `Model.move_router_state`; loads are sums of gates."""
    del rate
    if not router_state:
      return router_state
    new_state = {STEPS: router_state[STEPS] + 1}
    num_experts = self.options.deep_moe.num_experts
    for i, (row, E) in enumerate(zip(load, num_experts, strict=True)):
      totals = router_state[f'layer_{i}'][TOTALS]
      new_state[f'layer_{i}'] = {TOTALS: running_totals.moved(totals, row[:E])}
    return new_state

  @nn.nowrap
  def inputs(self, batch: Batch) -> dict[str, Any]:
    """See `Model.inputs`."""
    return {key: batch[key] for key in ('features', 'segment_ids')}

  @nn.nowrap
  def class_scores(self, outputs):
    """See `FeatureModel.class_scores`; they are the logits."""
    return outputs[:, 0]

  @nn.nowrap
  def loss(self, outputs: Float32[Array, 'B 1 V'], batch: Batch) -> TokenLosses:
    """The cross-entropy of each example's class, in nats."""
    import optax  # see `TextModel.loss`

    nats = optax.softmax_cross_entropy_with_integer_labels
    return TokenLosses(nats(counted(outputs, batch), batch['targets']))


def _dense(
  shared: Shared, role: str, size: int, axes: tuple[str, str], name: str
) -> nn.Dense:
  return nn.Dense(
    size,
    kernel_init=parameters.kernel(shared, axes, role=role),
    bias_init=parameters.bias(axes[1:], role=role),
    name=name,
  )
