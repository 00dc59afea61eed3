"""Peculiarities of transformers' models, as classes that a config can name.

The config of an imported run names a class, such as
'moe_jax.interop.quirks:ServedByRank', so that the peculiarity also applies to
the run's training, generation and export.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar, Self

import jax.numpy as jnp

from moe_jax.config import fields_of, option
from moe_jax.layers.block import Context
from moe_jax.layers.rotary import LongRope
from moe_jax.layers.routers.token_choice import TokenChoice, TokenChoiceRouter
from moe_jax.models import EncoderDecoderOptions
from moe_jax.models.embeddings import EmbeddingConfig
from moe_jax.models.stack import Padding
from moe_jax.partitioning import Rules
from moe_jax.routing import Routing
from moe_jax.routing.capacity import Capacity
from moe_jax.shapes import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class ServedByRank(TokenChoice):
  """Token choice whose choices are always served by expert 1 and expert 0.

  transformers' NLLB-MoE (in versions 5.0 to 5.24) chooses experts as published,
  https://arxiv.org/abs/2207.04672, but takes the first choice's one-hot mask
  for a list of experts. So every token's first choice is computed by expert 1
  and its second by expert 0, whichever were chosen; the chosen experts decide
  gates, drops, losses and statistics.
  """

  # The router's columns do not decide the serving experts, so that no column
  # can be pruned or lead to another expert.
  has_columns: ClassVar[bool] = False
  # Choices cannot be imposed: the experts that serve a token would not be the
  # imposed ones, as they are not those that a token chooses.
  takes_choices: ClassVar[bool] = False

  def problems_with(self, sizes):
    yield from super().problems_with(sizes)
    if sizes.num_selected != 2:
      yield (
        f'num_selected={sizes.num_selected} of a router that serves by rank '
        'must be 2'
      )

  def module(self, sizes, shared, name=None):
    return ServedByRankRouter(self, sizes, shared, name=name)


class ServedByRankRouter(TokenChoiceRouter):
  """The router of `ServedByRank`: token choice, and then `by_rank`."""

  options: ServedByRank

  def route(self, x, mask, train, token_info, layer):
    routing, aux = super().route(x, mask, train, token_info, layer)
    return by_rank(routing), aux


def by_rank(routing: Routing) -> Routing:
  """The routing that transformers' NLLB-MoE serves, for `ServedByRank`.

  Its experts take a mask for indices, so that expert 1 serves first choices and
  expert 0 second ones; an imported model has to repeat this. Gates and drops
  stay the same. A token's slot in both experts is its index in the group, and a
  bounded capacity becomes S, so no further token is dropped.
  """
  G, S, K = routing.expert_index.shape
  expert_index = jnp.broadcast_to(jnp.array([1, 0], jnp.int32), (G, S, K))
  slot = jnp.arange(S, dtype=jnp.int32)[None, :, None]
  return dataclasses.replace(
    routing,
    expert_index=expert_index,
    slot=jnp.broadcast_to(slot, (G, S, K)),
    capacity=None if routing.capacity is None else S,
  )


@dataclasses.dataclass(frozen=True)
class EvenSlots(Capacity):
  """A capacity of factor * K * S / E, rounded down, and then up to be even.

  It is at least `minimum` and at most S. OpenMoE's PyTorch code has this
  capacity, in evaluation and generation too, and computes it in floating point.
  """

  factor: float = option(
    2.0,
    "Capacity factor: slots of all experts together, divided by the group's "
    'choices.',
    above=0,
  )
  minimum: int = option(
    4, 'Least capacity, in slots per expert and group.', minimum=1
  )

  def per_expert(self, group_size, num_experts, num_selected):
    slots = math.floor(num_selected * self.factor * group_size / num_experts)
    return min(max(slots + slots % 2, self.minimum), group_size)

  def keeps_in_generation(self, single):
    """True: generation drops tokens as well, as in OpenMoE's code.

    `single`, whether a step has one token a group, makes no difference.
    """
    return True


@dataclasses.dataclass(frozen=True)
class ShortTurns(LongRope):
  """LongRoPE whose frequencies in long rows are those of short rows.

  transformers' Phi-3.5-MoE (in version 5.24) recomputes the frequencies without
  the length of the rows, so that `long_factor`, which divides them, is never
  used; `long_mscale`, the factor of long rows' queries and keys, is.
  """

  def turns(self, theta, width, long=False):
    short = super().turns(theta, width)
    if not long:
      return short
    return super().turns(theta, width, long)._replace(frequency=short.frequency)


@dataclasses.dataclass(frozen=True)
class RoutedPadding(Padding):
  """Padding that is routed, takes slots and attends to real tokens.

  transformers' Switch computes it so, and NLLB-MoE with one of its options.
  """

  def context(self, context: Context) -> Context:
    """The context with padding that is routed and attends to segment 1.

    No token attends to padding.
    """
    context = context._replace(routed_mask=jnp.ones_like(context.token_mask))
    if context.segment_ids is None:
      return context
    return context._replace(
      segment_ids=jnp.maximum(context.segment_ids, 1),
      key_segment_ids=context.segment_ids,
    )

  def routed(self, segment_ids: Int[Array, 'B T']) -> Bool[Array, 'B T']:
    return jnp.ones(segment_ids.shape, bool)


@dataclasses.dataclass(frozen=True)
class TransformersEncoderDecoder(EncoderDecoderOptions):
  """An encoder-decoder as transformers computes Switch and NLLB-MoE."""

  route_padding: bool = option(
    False,
    'Whether padding is routed, takes slots and counts in the losses of '
    "routers, as in transformers' Switch, whose routers have no mask.",
  )
  encoder_table: bool = option(
    False,
    'Whether the encoder has an embedding table of its own, as in transformers '
    '5.24 if embeddings are not tied.',
  )

  @classmethod
  def of(cls, options: EncoderDecoderOptions) -> Self:
    """The given options as an instance of this class."""
    names = fields_of(type(options))
    return cls(**{name: getattr(options, name) for name in names})

  @property
  def padding(self) -> Padding:
    return RoutedPadding() if self.route_padding else Padding()

  def problems(self) -> Iterator[str]:
    yield from super().problems()
    if self.encoder_table and self.embedding.tie:
      yield 'encoder_table=True has no effect unless embedding.tie=False'

  def embedding_config(self, rules: Rules) -> EmbeddingConfig:
    embedding = super().embedding_config(rules)
    return dataclasses.replace(embedding, encoder_table=self.encoder_table)
