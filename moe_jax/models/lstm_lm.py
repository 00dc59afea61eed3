"""The language model of 2017: LSTMs with a mixture of experts between them.

Shazeer et al. (https://arxiv.org/abs/1701.06538), Appendix C: an embedding,
layers that each add to a residual, and logits. The mixture is applied to all
tokens of a row at once, and its output passes a sigmoid. Unlike the paper, the
softmax is over the whole vocabulary.
"""

import dataclasses
from collections.abc import Iterator
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import fields_of, option
from moe_jax.layers import lstm
from moe_jax.layers.experts import Twin
from moe_jax.layers.ffn import FeedForward
from moe_jax.layers.lstm import Lstm, LstmOptions, LstmState
from moe_jax.layers.moe import MoE
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.positions import POSITIONS, NoPositions
from moe_jax.layers.routers import ROUTERS
from moe_jax.layers.shared import RULES, Shared
from moe_jax.models.base import Model, ModelOptions
from moe_jax.models.decoding import check_decodes, serving_all
from moe_jax.models.description import Layer, LayerStack, Stacks
from moe_jax.models.embeddings import EmbeddingConfig, Embeddings
from moe_jax.models.logits import Logits
from moe_jax.partitioning import Rules
from moe_jax.routing import GivenChoices, MoeAux, empty_aux
from moe_jax.routing.given_choice_rule import check_given, given_to_layer
from moe_jax.routing.rows import without_nan
from moe_jax.shapes import Array, Bool, Float32, Int, Leaf, checked


@dataclasses.dataclass(frozen=True)
class LstmLmOptions(ModelOptions):
  """The options of a language model of LSTMs, with mixtures at `moe.layers`."""

  lstm: LstmOptions = option(
    LstmOptions(), 'LSTM layers, which are all layers but those of moe.layers.'
  )

  def problems(self) -> Iterator[str]:
    yield from super().problems()
    router = self.moe.router
    if router.reads or router.keeps_state:
      yield (
        f'moe.router.kind={ROUTERS.name_of(router)!r}: a model of LSTMs knows '
        'neither routers that hash tokens nor those that keep a state, such as '
        'a balancing bias'
      )
    if self.moe.retained.layers:
      yield (
        f'moe.retained names layers {sorted(self.moe.retained.layers)}: the '
        'sparse layers of a model of LSTMs have all num_experts experts'
      )
    if self.moe.shared_expert.hidden and self.lstm.twin_depth > 1:
      yield (
        f'moe.shared_expert.hidden={self.moe.shared_expert.hidden} with '
        f'lstm.twin_depth={self.lstm.twin_depth}: a dense twin of several '
        'hidden layers has no shared expert'
      )
    if self.moe.extra_ffn:
      yield 'moe.extra_ffn=True has no effect in a model of LSTMs'
    # LSTMs have no attention, which alone reads positions that are not added.
    unread = fields_of(type(self))['positions'].default, NoPositions()
    if not self.positions.added and self.positions not in unread:
      yield (
        f'positions.kind={POSITIONS.name_of(self.positions)!r} has no effect '
        'in a model without attention'
      )

  def least_parameters(self) -> int:
    lstms = self.num_layers - self.num_sparse
    values = lstms * 2 * self.width * lstm.GATES * self.lstm.cells(self.width)
    values += self.feed_forward_parameters(self.width, dense=0)
    return super().least_parameters() + values

  @property
  def mixture(self) -> MoeOptions | None:
    """The mixture of experts of the sparse layers, with all sizes filled in.

    None in a model without experts.
    """
    if not self.has_experts:
      return None
    return self.moe.within(self.ffn, self.dropout)

  @property
  def twin(self) -> Twin:
    """The dense feed-forward in place of `mixture` in a model without experts.

    With `lstm.twin_depth` 1 its hidden layer is as wide as K experts and the
    shared expert; with more, each hidden layer is as wide as one expert.
    """
    moe = self.moe.within(self.ffn, self.dropout)
    return moe.twin() if self.lstm.twin_depth == 1 else moe.expert.twin(1)

  def build(self, rules: Rules = RULES) -> 'LstmLm':
    self.check_filled()
    return LstmLm(self.embedding_config(rules), self)


class LstmCache(flax.struct.PyTreeNode):
  """The states that an LSTM language model keeps between steps.

  Attributes:
    states: The `LstmState` of each LSTM layer, of B rows; None for a layer that
      is a mixture of experts or a feed-forward.
    next_position: int32 [B], the position of each row's next token.
    memory: None, as there is no encoder.
  """

  states: tuple[LstmState | None, ...]
  next_position: Leaf
  memory: None = None

  def take(self, rows: Int[Array, ' R']) -> 'LstmCache':
    """The cache whose row r is row `rows[r]` of this cache."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, 0), self)


class LstmLm(Model):
  """An LSTM language model, from tokens to logits of the next token.

  Attributes:
    embedding: The configuration of embeddings and logits.
    options: The options of the layers between embeddings and logits.
  """

  embedding: EmbeddingConfig
  options: LstmLmOptions

  def setup(self) -> None:
    """Makes the submodules; embedding tables are in the model's own scope."""
    self.embeddings = Embeddings(self.embedding)
    nn.share_scope(self, self.embeddings)
    o, shared = self.options, self.embedding.shared
    self.layers = [
      _Layer(o, shared, sparse, i) for i, sparse in enumerate(o.sparse)
    ]

  @property
  def stacks(self) -> Stacks:
    moe = self.options.mixture
    layers = (
      Layer(moe if sparse else None, (f'layers_{i}',))
      for i, sparse in enumerate(self.options.sparse)
    )
    return Stacks([LayerStack(tuple(layers))])

  @checked
  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    train: bool = False,
    given: GivenChoices | None = None,
  ) -> tuple[Float32[Array, 'B T V'] | Logits, MoeAux]:
    """Returns float32 logits, and losses and statistics of layers, [L, ...].

    Args:
      tokens: Token ids.
      segment_ids: The index, from 1, of each token's document in its row, with
        which states begin anew; 0 is padding, which no router sees. Default:
        one document.
      positions: The position of each token in its document, for embeddings with
        positions. Default: the position in the row.
      train: Turns on dropout and router noise (rngs 'dropout', 'router').
      given: Choices that are imposed on the routers of the L sparse layers,
        [B, T, L, K].
    """
    B, T = tokens.shape
    if segment_ids is None:
      segment_ids = jnp.ones((B, T), jnp.int32)
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    no_states = (None,) * len(self.layers)
    logits, aux, _ = self._run(
      tokens, segment_ids, positions, train, no_states, given
    )
    return logits, aux

  def _run(self, tokens, segment_ids, positions, train, states, given=None):
    """The logits, the layers' losses and statistics, and the last states.

    States are a tuple with the `LstmState` of each layer; None for a layer
    without one, and, in `states`, for one that begins with zeros. Padding has
    segment 0. `given` imposes choices [B, T, L, K] on the L sparse layers.
    """
    sparse = self.options.sparse
    check_given(given, sparse if self.options.mixture else ())
    x = self.embeddings.embed(tokens, segment_ids > 0, positions, train)
    x = without_nan(segment_ids > 0, x)
    auxes, new_states = [], []
    for i, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
      layer_choices = given_to_layer(given, sparse, i)
      x, aux, state = layer(x, segment_ids, train, state, layer_choices)
      auxes.append(aux)
      new_states.append(state)
    aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)
    return self.embeddings.outputs(x), aux, tuple(new_states)

  @checked
  def decode(
    self,
    tokens: Int[Array, 'B T'],
    token_mask: Bool[Array, 'B T'],
    cache: LstmCache,
  ) -> tuple[Float32[Array, 'B T V'], LstmCache]:
    """Returns the logits at further tokens, and the cache after them.

    Args:
      tokens: Token ids that follow those in the cache; a row may begin with
        padding.
      token_mask: False at padding.
      cache: The cache from `make_cache` or an earlier call.
    """
    count = jnp.cumsum(token_mask.astype(jnp.int32), axis=1)
    positions = jnp.maximum(cache.next_position[:, None] + count - 1, 0)
    segment_ids = token_mask.astype(jnp.int32)
    logits, _, states = self._run(
      tokens, segment_ids, positions, False, cache.states
    )
    position = cache.next_position + count[:, -1]
    return cast(Array, logits), LstmCache(states, position)

  @nn.nowrap
  def make_cache(self, batch_size: int, max_len: int) -> LstmCache:
    """The states with which rows begin; `max_len` has no effect.

    Raises:
      ValueError: The router cannot route tokens one by one.
    """
    del max_len
    o, embedding = self.options, self.embedding
    check_decodes(o.mixture)
    state = lstm.start(o.lstm, embedding.shared, batch_size, embedding.width)
    return LstmCache(
      tuple(None if sparse else state for sparse in o.sparse),
      jnp.zeros(batch_size, jnp.int32),
    )

  @nn.nowrap
  def for_decoding(self, variables, *, batch_size=1, platform='', window=0):
    del batch_size, platform, window
    options, moe = self.options, self.options.mixture
    check_decodes(moe)
    if moe is not None:
      moe = serving_all(moe, causal=True)
      options = dataclasses.replace(options, moe=moe)
    variables = {**variables, 'params': nn.meta.unbox(variables['params'])}
    return self.clone(options=options), variables


class _Layer(nn.Module):
  """Adds dropout(lstm(x)) or dropout(sigmoid(feed_forward(x))) to x.

  A layer that is `sparse` has the feed-forward, which is a mixture of experts
  or its dense twin; `number` is its index in the model.
  """

  options: LstmLmOptions
  shared: Shared
  sparse: bool
  number: int

  @nn.compact
  def __call__(self, x, segment_ids, train, state, given):
    """The residual stream, losses and statistics, and an LSTM's last state.

    Without an LSTM the `state` is returned as it is. `given` are choices
    [B, T, K] that are imposed on the router, or None.
    """
    o, shared, moe = self.options, self.shared, self.options.mixture
    aux = empty_aux(1, 1) if moe is None else moe.dense_aux()
    if not self.sparse:
      y, state = Lstm(o.lstm, shared, name='lstm')(x, segment_ids, state)
    elif moe is not None:
      mixture, mask = MoE(moe, shared, name='moe'), segment_ids > 0
      y, aux = mixture(x, mask, train, layer=self.number, given=given)
      y = jax.nn.sigmoid(y)
    else:
      ffn, dropout = o.twin
      depth = o.lstm.twin_depth
      layer = FeedForward(ffn, shared, dropout, depth=depth, name='ffn')
      y = jax.nn.sigmoid(layer(x, train))
    y = nn.Dropout(o.dropout, deterministic=not train)(y)
    return x + y, aux, state
