"""Sentence routing: a sentence's mean chooses the experts of all its tokens.

https://arxiv.org/abs/2110.03742. A sentence is a segment of a row: an example,
or a document of a language model.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.partitioning import on_each_device
from moe_jax.shapes import Array, Bool, Float32, Int, Int32, UInt32, checked


@dataclasses.dataclass(frozen=True)
class Sentence(contract.RouterOptions):
  """The options of routing by sentence; losses count tokens, not sentences.

  All tokens of a sentence go to the same experts, so that a capacity would drop
  most of them: only a capacity that drops nothing is allowed.
  """

  takes_choices: ClassVar[bool] = True
  has_columns: ClassVar[bool] = True
  reads: ClassVar[tuple[str, ...]] = ('segment_ids',)

  gates: str = shared_options.GATES
  jitter: float = shared_options.JITTER
  use_bias: bool = shared_options.USE_BIAS
  balance_weight: float = shared_options.BALANCE_WEIGHT
  balance_choices: str = shared_options.BALANCE_CHOICES
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT

  def problems_with(self, sizes):
    yield from steps.gate_problems(sizes, self.gates)
    yield from steps.drop_problems(sizes)

  def module(self, sizes, shared, name=None):
    return SentenceRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality(
      "router.kind='sentence' goes by the mean of the whole sentence, so that "
      "later tokens change earlier outputs; use 'token_choice' or 'task'",
      drops=sizes.capacity.binds,
      undecodable=(
        'the sentence router needs the whole sentence, which is not there '
        'while it is generated; an encoder can route by sentence'
      ),
    )


class SentenceRouter(contract.Router):
  """A linear layer on means of sentences, then token choice; see `Router`."""

  options: Sentence

  def route(self, x, mask, train, token_info, layer, given=None):
    o = self.options
    ids = sentence_ids(token_info.segment_ids, self.sizes.row_length)
    means, sentence = on_each_device(
      sentence_means, (x.astype(jnp.float32), ids, mask)
    )
    # Noise is drawn before the means are spread, so that the tokens of a
    # sentence share it, too.
    noisy_means = steps.jittered(self, means, o.jitter, train)
    means = on_each_device(spread, (noisy_means, sentence))
    logits = steps.linear_logits(self, means, o.use_bias)
    index = steps.largest(logits, self.sizes.num_selected)
    return steps.with_linear_gates(self, logits, index, mask, given)


def sentence_ids(
  segment_ids: Int[Array, 'G S'], row_length: int
) -> UInt32[Array, 'G S']:
  """An id of each token's sentence, which the next sentence does not have.

  Args:
    segment_ids: The segment of each token in its row.
    row_length: The number of tokens of a row; a group is a part of a row, or
      several rows. 0: a group is a row.
  """
  S = segment_ids.shape[1]
  T = row_length or S
  row = jnp.arange(S, dtype=jnp.uint32) // T
  return segment_ids.astype(jnp.uint32) + jnp.uint32(T + 1) * row[None]


@checked
def sentence_means(
  x: Float32[Array, 'G S M'],
  ids: UInt32[Array, 'G S'],
  mask: Bool[Array, 'G S'],
) -> tuple[Float32[Array, 'G S M'], Int32[Array, 'G S']]:
  """The mean of the real tokens of each sentence in a group.

  Args:
    x: Token representations.
    ids: The id of each token's sentence, as in `sentence_ids`. Real tokens that
      follow each other and have the same id are a sentence; padding between
      them, whatever its id is, does not end it.
    mask: False for padding.

  Returns:
    The means, of which each sentence of a group has one row, in order; the rows
    that are left, up to S, are zero. And for each token the index of the row of
    its sentence.
  """
  S = x.shape[1]
  real_index = jnp.where(mask, jnp.arange(S)[None], 0)
  last = jax.lax.cummax(real_index, axis=1)  # the real token at or before each
  ids = jnp.take_along_axis(ids, last, axis=1)
  begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
  sentence = jnp.cumsum(begins.astype(jnp.int32), axis=1)  # [G, S], from 0

  def group_means(x, sentence, mask):
    real = mask.astype(jnp.float32)[:, None]
    total = jax.ops.segment_sum(x * real, sentence, S)
    count = jax.ops.segment_sum(real, sentence, S)
    return total / jnp.maximum(count, 1.0)

  return jax.vmap(group_means)(x, sentence, mask), sentence


@checked
def spread(
  rows: Float32[Array, 'G S M'], sentence: Int32[Array, 'G S']
) -> Float32[Array, 'G S M']:
  """Gives each token the row of its sentence, at the index `sentence`."""
  return jnp.take_along_axis(rows, sentence[..., None], axis=1)
