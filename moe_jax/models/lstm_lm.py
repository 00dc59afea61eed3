"""The language model of 2017: LSTMs with a mixture of experts between them.

Shazeer et al. (https://arxiv.org/abs/1701.06538), Appendix C: an embedding,
layers that each add to a residual, and logits. The mixture is applied to all
steps at once, and its output passes a sigmoid. Unlike the paper, the softmax is
over the whole vocabulary. Not here: how a config becomes an `LstmLmConfig`
(`build.py`).
"""

import dataclasses
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers import lstm
from moe_jax.layers.ffn import DeepFeedForward, FfnConfig
from moe_jax.layers.lstm import Lstm, LstmConfig, LstmState
from moe_jax.layers.moe import MoE, MoeConfig
from moe_jax.models.causality import check_moe_decodes
from moe_jax.models.embeddings import EmbeddingConfig, Embeddings
from moe_jax.routing import MoeAux, empty_aux
from moe_jax.shapes import Array, Bool, Float32, Int, Leaf


@dataclasses.dataclass(frozen=True)
class LstmLmConfig:
  """A language model of LSTMs and feed-forward layers.

  Attributes:
    embedding: Tokens in and logits out.
    sparse: A flag a layer: whether it is the feed-forward, or an LSTM.
    lstm: The LSTMs.
    moe: The feed-forward; None in a model without experts.
    twin: In a dense twin, the dense feed-forward in place of `moe`.
    twin_depth: Its hidden layers.
    dropout: Rate on what a layer adds to the residual, in training.
  """

  embedding: EmbeddingConfig
  sparse: tuple[bool, ...]
  lstm: LstmConfig
  moe: MoeConfig | None = None
  twin: FfnConfig | None = None
  twin_depth: int = 1
  dropout: float = 0.0

  def __post_init__(self):
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} not in [0, 1)')
    if self.twin_depth < 1:
      raise ValueError(f'lstm.twin_depth={self.twin_depth} must be at least 1')
    router = self.moe.router if self.moe else None
    if router and (router.kind == 'hash' or router.balance_bias_rate):
      raise ValueError(
        f'router={router.kind!r} with balance_bias_rate='
        f"{router.balance_bias_rate} in model.kind='lstm', which knows neither "
        "'hash' nor a balancing bias"
      )

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.embedding.vocab_size

  @property
  def stacks(self) -> tuple:
    """It has no stack of blocks."""
    return ()

  def sequence_of(self, layer: int) -> str:
    """What stands before a batch's 'tokens' that a layer sees: nothing."""
    del layer
    return ''


class LstmCache(flax.struct.PyTreeNode):
  """What an LSTM language model keeps between steps.

  Attributes:
    states: A layer's `LstmState` of rows [B, ...]; None of a feed-forward.
    next_position: int32 [B], the position of each row's next token.
    memory: None: no encoder is read.
  """

  states: tuple[LstmState | None, ...]
  next_position: Leaf
  memory: None = None

  def take(self, rows: Int[Array, ' R']) -> 'LstmCache':
    """The cache whose row r is row `rows[r]` of this one."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, 0), self)


class LstmLm(nn.Module):
  """Tokens to next-token logits."""

  config: LstmLmConfig

  def setup(self) -> None:
    """Makes the parts; tables stand in the model's own scope."""
    c = self.config
    self.embeddings = Embeddings(c.embedding)
    nn.share_scope(self, self.embeddings)
    self.layers = [_Layer(c, sparse) for sparse in c.sparse]

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    train: bool = False,
  ) -> tuple[Float32[Array, 'B T V'], MoeAux]:
    """Returns float32 logits and the layers' aux, every leaf [L, ...].

    Args:
      tokens: Token ids.
      segment_ids: The document of each token in its row, from 1, where states
        begin anew; 0 is padding, which no router sees. Default: one document.
      positions: Of each token in its document, for embeddings that have them.
        Default: its place in the row.
      train: Turns on dropout and router noise (rngs 'dropout', 'router').
    """
    B, T = tokens.shape
    if segment_ids is None:
      segment_ids = jnp.ones((B, T), jnp.int32)
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    nothing = (None,) * len(self.layers)
    logits, aux, _ = self._run(tokens, segment_ids, positions, train, nothing)
    return logits, aux

  def _run(self, tokens, segment_ids, positions, train, states):
    """Logits, aux and the layers' states after the last step."""
    x = self.embeddings.embed(tokens, segment_ids > 0, positions, train)
    auxes, left = [], []
    for layer, state in zip(self.layers, states, strict=True):
      x, aux, state = layer(x, segment_ids, train, state)
      auxes.append(aux)
      left.append(state)
    aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)
    return self.embeddings.logits(x), aux, tuple(left)

  def decode(
    self,
    tokens: Int[Array, 'B T'],
    token_mask: Bool[Array, 'B T'],
    cache: LstmCache,
  ) -> tuple[Float32[Array, 'B T V'], LstmCache]:
    """Logits of the tokens that follow those of the cache; they join it.

    Args:
      tokens: Token ids; a row's first ones may be padding.
      token_mask: False at padding.
      cache: From `make_cache` or an earlier call.
    """
    count = jnp.cumsum(token_mask.astype(jnp.int32), axis=1)
    positions = jnp.maximum(cache.next_position[:, None] + count - 1, 0)
    segment_ids = token_mask.astype(jnp.int32)
    logits, _, states = self._run(
      tokens, segment_ids, positions, False, cache.states
    )
    position = cache.next_position + count[:, -1]
    return logits, LstmCache(states, position)

  @nn.nowrap
  def make_cache(self, batch_size: int, max_len: int) -> LstmCache:
    """What `batch_size` rows begin with, however long they get.

    Raises:
      ValueError: Its experts choose among tokens.
    """
    del max_len
    c = self.config
    check_moe_decodes(c.moe)
    state = lstm.start(c.lstm, batch_size, c.embedding.width)
    return LstmCache(
      tuple(None if sparse else state for sparse in c.sparse),
      jnp.zeros(batch_size, jnp.int32),
    )

  @staticmethod
  def inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The arguments of a call that are in a batch."""
    return {key: batch[key] for key in ('tokens', 'segment_ids', 'positions')}

  @staticmethod
  def example(tokens: Int[Array, 'B T']) -> dict[str, Array]:
    """The arguments of a call that has nothing but tokens."""
    return {'tokens': tokens}


class _Layer(nn.Module):
  """x + dropout(lstm(x)), or x + dropout(sigmoid(feed_forward(x)))."""

  config: LstmLmConfig
  sparse: bool

  @nn.compact
  def __call__(self, x, segment_ids, train, state):
    """The residual stream, aux, and the state that an LSTM leaves."""
    c = self.config
    aux = empty_aux(1, 1)
    if c.moe is not None:
      router = c.moe.router
      aux = empty_aux(router.num_experts, router.num_selected)
    if not self.sparse:
      y, state = Lstm(c.lstm, name='lstm')(x, segment_ids, state)
    elif c.moe is not None:
      y, aux = MoE(c.moe, name='moe')(x, segment_ids > 0, train)
      y = jax.nn.sigmoid(y)
    else:
      y = DeepFeedForward(c.twin, c.twin_depth, name='ffn')(x, train)
      y = jax.nn.sigmoid(y)
    y = nn.Dropout(c.dropout, deterministic=not train)(y)
    return x + y, aux, state
