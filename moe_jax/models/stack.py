"""A stack of blocks: a decoder has one stack, an encoder-decoder has two.

Layers that repeat a pattern are compiled as one loop, so that compile time does
not grow with L.
"""

import dataclasses
import itertools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.kernels.grouped_products import PRODUCT as GROUPED_PRODUCT
from moe_jax.kernels.rows_product import HIDDEN, PRODUCT
from moe_jax.layers.attention.attention import OUTPUT
from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.block import Block, BlockConfig, Context
from moe_jax.layers.experts.experts import ROWS
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models.pattern import Segment, layer_name, period_name, segments
from moe_jax.routing import MoeAux
from moe_jax.routing.given_choice_rule import given_to_layer
from moe_jax.routing.rows import DECISION, without_nan
from moe_jax.routing.stats import with_room
from moe_jax.shapes import Array, Bool, Float, Int, Int32


@dataclasses.dataclass(frozen=True)
class Padding:
  """The rule that padding takes no slot, is not counted and not attended to."""

  def context(self, context: Context) -> Context:
    """The arrays that blocks read, made from a context that hides padding.

    Here the context is returned as it is; a subclass may let padding be seen,
    as imports of transformers' Switch need it.
    """
    return context

  def routed(self, segment_ids: Int[Array, 'B T']) -> Bool[Array, 'B T']:
    """The tokens that routers count, as True; segment 0 is padding."""
    return segment_ids > 0


# Names of what the backward pass keeps of a layer, by the names that options
# give them. Routers' decisions, which are small integers, are always kept.
KEPT = {
  'rows': (ROWS,),
  'hidden': (HIDDEN,),
  'attention': (OUTPUT,),
  'products': (PRODUCT, GROUPED_PRODUCT),
}
REMATS = {'none': None, 'full': (), 'dots': ('products',)}
_SAVE = 'save='


def kept_names(remat: str) -> tuple[str, ...] | None:
  """The names of a layer's arrays that the backward pass keeps.

  A layer's input and its router's decisions are always kept; None stands for
  all arrays. The names are among `KEPT`; `remat` is one of `REMATS` or 'save='
  and names with commas between them.

  Raises:
    ValueError: `remat` is neither.
  """
  if not remat.startswith(_SAVE):
    if remat not in REMATS:
      raise unknown('remat', remat, (*REMATS, *(_SAVE + name for name in KEPT)))
    return REMATS[remat]
  names = tuple(remat.removeprefix(_SAVE).split(','))
  for name in names:
    if name not in KEPT:
      raise unknown(f'name in remat={remat!r}', name, KEPT)
  return names


@dataclasses.dataclass(frozen=True)
class StackConfig:
  """The options of L blocks and a final norm.

  Attributes:
    sparse: A flag for each of L layers: whether its feed-forward is sparse, or
      the dense twin of a sparse one.
    block: The options that all layers share, but for the window of attention.
    windows: The window of each layer's attention; 0 for none.
    padding: The rule for whether blocks and routers see padding.
    scan_layers: Whether the periods of the layer pattern are a loop (compile
      time independent of L) or unrolled; results are the same.
    remat: What the backward pass recomputes; `kept_names` reads it.
    stacked: Whether periods of a segment share stacked arrays of parameters. If
      not, each period has its own, which decoding reads without a copy.
  """

  sparse: tuple[bool, ...]
  block: BlockConfig
  windows: tuple[int, ...]
  padding: Padding
  scan_layers: bool
  remat: str
  stacked: bool = True

  @property
  def experts(self) -> MoeOptions | None:
    """The mixture of experts of the sparse layers; None if there are none."""
    moe = self.block.moe
    return moe if moe is not None and moe.num_experts else None

  @property
  def kinds(self) -> tuple['LayerKind', ...]:
    """The kind of each layer; layers of one kind have the same options."""
    moe = self.block.moe
    return tuple(
      LayerKind(moe.in_layer(i) if flag and moe is not None else None, window)
      for i, (flag, window) in enumerate(
        zip(self.sparse, self.windows, strict=True)
      )
    )

  def cache_lengths(self, max_len: int) -> tuple[int, ...]:
    """The number of slots in each layer's cache: its window, at most `max_len`.

    A layer without a window has `max_len` slots. Layers whose parameters are
    stacked all have as many slots as the longest cache.
    """
    lengths = tuple(min(w or max_len, max_len) for w in self.windows)
    return (max(lengths),) * len(lengths) if self.stacked else lengths

  @property
  def moes(self) -> tuple[MoeOptions | None, ...]:
    """The mixture of experts of each layer; None for a dense layer."""
    experts = self.experts
    return tuple(kind.moe if experts else None for kind in self.kinds)


class LayerKind(NamedTuple):
  """The options in which a layer may differ from other layers of its stack.

  Attributes:
    moe: The options of the layer's mixture, or of the mixture whose dense twin
      it has; None if its feed-forward is dense.
    window: The window of the layer's attention; 0 for none.
  """

  moe: MoeOptions | None
  window: int = 0


class Stack(nn.Module):
  """All blocks of a stack and the final norm."""

  config: StackConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    context: Context,
    train: bool = False,
    cache: KVCache | None = None,
  ) -> tuple[Float[Array, 'B T M'], MoeAux, KVCache | None]:
    """Returns the output, the layers' losses and statistics, and the cache.

    Losses and statistics are a `MoeAux`, every leaf of which is [L, ...].

    Args:
      x: Embedded tokens.
      context: The arrays that blocks read, without the bias of attention, which
        is computed here.
      train: Turns on dropout and router noise.
      cache: When decoding, the cache of the tokens before x, after
        `KVCache.begin`; the returned cache has x's keys and values, too.
    """
    c, T, block = self.config, x.shape[1], self.config.block
    bias = block.positions.bias(
      block.attention.num_heads, block.causal, 'relative_positions'
    )
    if bias is not None:
      bias_sizes = (T, T) if cache is None else (T, cache.max_len, cache.length)
      context = context._replace(bias=bias(*bias_sizes))
    context = c.padding.context(context)
    x = without_nan(context.routed, x)
    auxes, first = [], 0
    for segment in segments(c.kinds):
      numbers = np.arange(first, first + segment.num_layers, dtype=np.int32)
      numbers = numbers.reshape(segment.repeats, -1)
      first += segment.num_layers
      if c.stacked:
        loop = _scanned(c, segment, train)
        (x, cache), aux = loop((x, cache), cast(Array, numbers), context)
        # Every leaf is [repeats, period, ...].
        auxes.append(
          jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)
        )
        continue
      for i, period_numbers in enumerate(numbers.tolist()):
        name = period_name(segment, i)
        period = Period(c, segment.pattern, train, False, name=name)
        (x, cache), aux = period((x, cache), tuple(period_numbers), context)
        auxes.append(aux)
    aux = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *auxes)
    x = block.norm.module(block.shared, 'final_norm')(x)
    return x, aux, cache


def _scanned(c: StackConfig, segment: Segment, train: bool):
  """The loop over a segment's periods, a module; unrolled if not `scan_layers`.

  It is called with ((x, cache), the indices of layers [repeats, period],
  context) and returns (x, cache) and the layers' `MoeAux` of leaves [repeats,
  period, ...]; `train` turns on dropout and router noise.
  """
  loops = c.scan_layers and segment.repeats > 1
  scanned = nn.scan(
    Period,
    variable_axes={'params': 0, 'intermediates': 0, 'router_state': 0},
    split_rngs={'params': True, 'dropout': True, 'router': True},
    in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
    length=segment.repeats,
    unroll=1 if loops else segment.repeats,
    metadata_params={nn.PARTITION_NAME: 'layers'},
    # The check would trace every period once more.
    check_constancy_invariants=False,
  )
  return scanned(c, segment.pattern, train, loops, name=segment.name)


class Period(nn.Module):
  """One period of the layer pattern; its parameters are stacked by the scan.

  Attributes:
    config: The options of the stack.
    pattern: The kind of each layer.
    train: Turns on dropout and router noise.
    loops: Whether the period is the body of a loop.
  """

  config: StackConfig
  pattern: tuple[LayerKind, ...]
  train: bool
  loops: bool

  @nn.compact
  def __call__(
    self,
    carry: tuple[Array, KVCache | None],
    numbers: Int32[Array, ' P'] | tuple[int, ...],
    context: Context,
  ) -> tuple[tuple[Array, KVCache | None], MoeAux]:
    """Applies the blocks to (x, cache); also returns losses and statistics.

    `numbers` are the indices of the period's P layers in the stack; every leaf
    of losses and statistics is [P, ...].
    """
    c = self.config
    block = Block
    if (kept := kept_names(c.remat)) is not None:
      # Merged with the forward pass, a recomputation would save no memory. The
      # compiler would merge them outside loops (unrolled, or a single period);
      # in a loop's body it never does, so nothing has to be prevented there.
      policy = jax.checkpoint_policies.save_only_these_names(
        DECISION, *itertools.chain(*(KEPT[name] for name in kept))
      )
      block = nn.remat(Block, policy=policy, prevent_cse=not self.loops)
    x, cache = carry
    auxes = []
    for i, (moe, window) in enumerate(self.pattern):
      attention = dataclasses.replace(c.block.attention, window=window)
      config = dataclasses.replace(
        c.block, moe=moe or c.block.moe, attention=attention
      )
      layer = block(config, moe is not None, self.train, name=layer_name(i))
      layer_choices = given_to_layer(context.given, c.sparse, numbers[i])
      layer_context = context._replace(given=layer_choices)
      x, cache, aux = layer(x, layer_context, cache, numbers[i])
      if c.experts is not None:
        aux = with_room(aux, c.experts.num_experts)
      auxes.append(aux)
    aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)
    return (x, cache), aux
