"""Soft MoE: every slot holds a mixture of all tokens of a group.

https://arxiv.org/abs/2308.00951. No token is chosen or dropped: a slot is a
weighted mean of the tokens, and a token's output a weighted mean of the outputs
of all slots. There is nothing to gather by index, so tokens move by products
(`dispatch.einsum`) alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.routing.assignments import Routing, TokenChoices
from moe_jax.routing.rows import decided
from moe_jax.shapes import Array, Bool, Float, Float32, Int32, Leaf, checked

# The logit of padding, whose softmax is 0 next to a real token's. It is finite,
# since the softmax of a group of padding alone would be NaN with -inf.
_NEVER = -1e30
# A vector whose squared length is below this number is not made of unit length.
_LEAST = 1e-12


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['share', 'gate'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SoftRouting:
  """The weights between tokens and slots, with methods named as in `Routing`.

  Attributes:
    share: float32 [G, S, E, C], the weight of each token in the mean that a
      slot holds; the weights of a slot sum to 1, and padding has 0.
    gate: float32 [G, S, E, C], the weight of each slot's output in the output
      of each token; the weights of a token sum to 1, and padding has 0.
  """

  share: Leaf
  gate: Leaf

  def shape_hints(self) -> dict[str, Any]:
    return {
      'share': Float32[Array, 'G S E C'],
      'gate': Float32[Array, 'G S E C'],
    }

  def static_sizes(self) -> dict[str, int]:
    return {}

  @property
  def num_experts(self) -> int:
    """E, the number of experts."""
    return self.gate.shape[2]

  @property
  def capacity(self) -> int:
    """C, the number of slots of an expert in each group."""
    return self.gate.shape[3]

  @property
  def group_size(self) -> int:
    """S, the number of tokens in a group."""
    return self.gate.shape[1]

  def slot_shares(self) -> Float32[Array, 'G S E C']:
    """The weight of each token in the mixture of each slot."""
    return self.share

  def slot_weights(self) -> Float32[Array, 'G S E C']:
    """The weight of each slot's output in the output of each token."""
    return self.gate

  def token_gates(self) -> Float32[Array, 'G S E']:
    """The weight of all of an expert's slots in the output of each token."""
    return self.gate.sum(-1)

  def by_token(self, mask: Bool[Array, 'G S']) -> TokenChoices:
    """All E experts as kept choices of each real token; -1 at padding."""
    shape = (*mask.shape, self.num_experts)
    kept = jnp.broadcast_to(mask[..., None], shape)
    expert = jnp.where(kept, jnp.arange(shape[-1], dtype=jnp.int32), -1)
    return TokenChoices(expert, self.token_gates(), kept)

  def rows_per_expert(self) -> Int32[Array, ' E']:
    """The number of slots of each expert, over all groups."""
    G, _, E, C = self.gate.shape
    return jnp.full(E, G * C, jnp.int32)

  def of_experts(
    self, number: Int32[Array, ' E'], num_experts: int
  ) -> 'SoftRouting':
    """The slots of some experts alone, numbered anew up to `num_experts`.

    `number` has the new index of each expert, `num_experts` or more for experts
    whose slots are left out. Weights are 0 at an index that no expert gets.
    """
    E = self.num_experts
    source = jnp.full(num_experts, E, jnp.int32)
    source = decided(source.at[number].set(jnp.arange(E), mode='drop'))
    take_experts = functools.partial(
      jnp.take, indices=source, axis=2, mode='fill', fill_value=0.0
    )
    return SoftRouting(take_experts(self.share), take_experts(self.gate))


# The routings that a router may return; `dispatch.einsum` takes them all.
AnyRouting = Routing | SoftRouting


def soft_logits(
  x: Float[Array, 'G S M'],
  slots: Float32[Array, 'M E C'],
  scale: Float32[Array, ' 1'],
) -> Float32[Array, 'G S E C']:
  """The cosines of tokens x and the vectors of slots, times the scale."""
  x = _of_unit_length(x.astype(jnp.float32), -1)
  slots = scale[:, None, None] * _of_unit_length(slots, 0)
  return jnp.einsum('GSM,MEC->GSEC', x, slots, precision='highest')


def _of_unit_length(x: Float32[Array, '*N'], axis: int) -> Float32[Array, '*N']:
  """The vectors along `axis`, divided by their lengths; 0 stays 0."""
  square = (x**2).sum(axis, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, _LEAST))


@checked
def soft_routing(
  logits: Float32[Array, 'G S E C'], mask: Bool[Array, 'G S'] | None = None
) -> SoftRouting:
  """Mixes all tokens of a group in every slot, and all slots in every token.

  The shares are the softmax of the logits over the tokens of a group, and the
  gates are the softmax of the logits over all slots of all experts.

  Args:
    logits: The logits of tokens and slots.
    mask: False for padding, which no slot holds. Default: all real.

  Source: Eq. 1-3 of arXiv:2308.00951.
  """
  if mask is None:
    mask = jnp.ones(logits.shape[:2], bool)
  real = mask[..., None, None]
  share = jax.nn.softmax(jnp.where(real, logits, _NEVER), axis=1)
  gate = jax.nn.softmax(logits, axis=(2, 3))
  return SoftRouting(jnp.where(real, share, 0.0), jnp.where(real, gate, 0.0))
