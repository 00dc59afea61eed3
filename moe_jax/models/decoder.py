"""The decoder-only Transformer: GLaM, Mixtral, OpenMoE, Switch-style LMs.

https://arxiv.org/abs/2112.06905, https://arxiv.org/abs/2401.04088,
https://arxiv.org/abs/2402.01739.
"""

import dataclasses
from collections.abc import Iterator
from typing import Self

from flax import linen as nn

from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.shared import RULES
from moe_jax.models.embeddings import Embeddings
from moe_jax.models.flat_trees import Path
from moe_jax.models.stack import Stack, StackConfig
from moe_jax.models.transformer import (
  Transformer,
  make_cache,
  make_context,
)
from moe_jax.models.transformer_options import TransformerOptions
from moe_jax.partitioning import Rules
from moe_jax.routing import GivenChoices, MoeAux
from moe_jax.shapes import Array, Float32, Int, checked


@dataclasses.dataclass(frozen=True)
class DecoderOptions(TransformerOptions):
  """The options of a decoder-only language model."""

  def problems(self) -> Iterator[str]:
    """The problems of all Transformers, and of routers that are not causal."""
    yield from super().problems()
    yield from self.leak()
    yield from self.task_problems()

  def build(self, rules: Rules = RULES) -> 'Decoder':
    self.check_filled()
    return Decoder(
      self.embedding_config(rules), self.stack_config(self, rules, causal=True)
    )


class Decoder(Transformer):
  """A model from tokens to logits of the next token.

  Attributes:
    embedding: The embeddings of tokens, and the logits.
    blocks: The blocks between them.
  """

  blocks: StackConfig

  def setup(self) -> None:
    """Makes the submodules, whose parameters are in the model's own scope."""
    self.embeddings = Embeddings(self.embedding)
    self.decoder = Stack(self.blocks)
    nn.share_scope(self, self.embeddings)
    nn.share_scope(self, self.decoder)

  @checked
  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    train: bool = False,
    task_ids: Int[Array, 'B T'] | None = None,
    given: GivenChoices | None = None,
  ) -> tuple[Float32[Array, 'B T V'], MoeAux]:
    """Returns float32 logits and the layers' aux, every leaf [L, ...].

    Args:
      tokens: Token ids.
      segment_ids: The document of each token in its row, from 1; 0 is
        padding, which no router sees. Default: one document a row.
      positions: The position of each token in its document. Default: that in
        the row.
      train: Turns on dropout and router noise (rngs 'dropout', 'router').
      task_ids: The task of each token, which a router by task needs.
      given: Choices that are imposed on the routers of the L sparse layers,
        [B, T, L, K].
    """
    context = make_context(
      self.blocks, tokens, segment_ids, positions, task_ids, given
    )
    x = self.embeddings.embed(
      tokens, context.token_mask, context.positions, train
    )
    x, aux, _ = self.decoder(x, context, train)
    return self.embeddings.logits(x), aux

  @nn.nowrap
  def make_cache(self, batch_size: int, max_len: int) -> KVCache:
    """An empty cache for rows of up to `max_len` tokens, padding included."""
    return make_cache(self.blocks, batch_size, max_len)

  @property
  def stacks(self) -> tuple[tuple[Path, StackConfig], ...]:
    return (((), self.blocks),)

  @nn.nowrap
  def with_stacks(self, stacks: tuple[StackConfig, ...]) -> Self:
    (blocks,) = stacks
    return self.clone(blocks=blocks)

  @nn.nowrap
  def window_beyond(self, seq_len):
    return 0 if self.embedding.positions.added else seq_len
