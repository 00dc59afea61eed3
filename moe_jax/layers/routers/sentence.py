"""Sentence routing: all tokens of a sentence go where their mean goes.

https://arxiv.org/abs/2110.03742. A sentence is a segment of a row: an example,
or a document of a language model.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.layers.routers.balancing import BalanceLoss, ImportanceLoss, ZLoss
from moe_jax.layers.routers.by_token import (
  Roomy,
  gates_of,
  logits_aux,
  serve,
)
from moe_jax.layers.routers.contract import Router
from moe_jax.layers.routers.linear_gate import (
  LinearGate,
  jittered,
  linear_logits,
)
from moe_jax.partitioning import on_each_device
from moe_jax.shapes import Array, Bool, Float32, Int32, UInt32, checked


@dataclasses.dataclass(frozen=True)
class Sentence(ImportanceLoss, ZLoss, BalanceLoss, LinearGate, Roomy):
  """The options of routing by sentence; losses count tokens, not sentences."""

  needs_ids: ClassVar[bool] = True
  needs_whole_rows: ClassVar[bool] = True
  takes_choices: ClassVar[bool] = True

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return SentenceRouter(self, sizes, shared, name=name)

  def leak(self, sizes):
    """The reason why the mean of a sentence leaks the future."""
    del sizes
    return (
      "router.kind='sentence' goes by the mean of the whole sentence, so that "
      "later tokens change earlier outputs; use 'token_choice' or 'task'"
    )

  def decodes(self, sizes):
    """The reason why a sentence cannot be routed before its end."""
    del sizes
    return (
      'the sentence router needs the whole sentence, which is not there while '
      'it is generated; an encoder can route by sentence'
    )

  def ids_of(self, tokens):
    """Numbers of sentences, each other than that of the next one in a batch."""
    segment_ids = tokens.segment_ids.astype(jnp.uint32)
    B, T = segment_ids.shape
    return (
      segment_ids + jnp.uint32(T + 1) * jnp.arange(B, dtype='uint32')[:, None]
    )


class SentenceRouter(Router):
  """A linear layer on means of sentences, then token choice; see `Router`."""

  options: Sentence

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    means, sentence = on_each_device(
      sentence_means, (x.astype(jnp.float32), router_ids, mask)
    )
    # Noise is drawn before means are spread, so that tokens share it, too.
    means = on_each_device(spread, (jittered(self, means, train), sentence))
    logits = linear_logits(self, means)
    chosen, _ = serve(self, logits, mask, train, given=given)
    gate = gates_of(self, logits, chosen)
    aux = logits_aux(self, chosen, logits, gate, mask)
    return chosen, aux


@checked
def sentence_means(
  x: Float32[Array, 'G S M'],
  ids: UInt32[Array, 'G S'],
  mask: Bool[Array, 'G S'],
) -> tuple[Float32[Array, 'G S M'], Int32[Array, 'G S']]:
  """The mean of each sentence's real tokens in its group.

  Args:
    x: Token representations.
    ids: The number of each token's sentence; that of padding does not matter.
      Real tokens of one number with no other between are one sentence.
    mask: False for padding.

  Returns:
    The means, as many rows of a group as it has sentences and then zeros, and
    the row of each token's sentence.
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
  """For each token the row of its sentence."""
  return jnp.take_along_axis(rows, sentence[..., None], axis=1)
