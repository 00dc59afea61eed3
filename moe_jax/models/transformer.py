"""Models of stacks of blocks, and the decoding steps of one stack.

Not here: a stack itself (`stack.py`), and which stacks a model has
(`decoder.py`, `encoder_decoder.py`).
"""

from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.block import Context
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models.base import Batch, check_decodes
from moe_jax.models.decoding import stack_for_decoding
from moe_jax.models.embeddings import Embeddings
from moe_jax.models.layer_trees import (
  LayerPlace,
  Path,
  layer_trees,
  map_layers,
  place_of,
)
from moe_jax.models.router_state import variables as as_variables
from moe_jax.models.stack import Stack, StackConfig
from moe_jax.models.text_model import TextModel
from moe_jax.routing import hash_rule
from moe_jax.shapes import Array, Bool, Float32, Int, Leaf


class Transformer(TextModel):
  """A model of stacks of blocks."""

  @nn.nowrap
  def with_stacks(self, stacks: tuple[StackConfig, ...]) -> Self:
    """The same model with these stacks in the place of `stacks`."""
    raise NotImplementedError

  @nn.nowrap
  def routed_tokens(self, batch: Batch) -> Float32[Array, ' L']:
    """See `Model.routed_tokens`."""
    counts = []
    for prefix, (_, stack) in zip(self.sequences, self.stacks, strict=True):
      routed = stack.padding.routed(batch[f'{prefix}segment_ids'])
      tokens = jnp.maximum(routed.sum().astype(jnp.float32), 1.0)
      counts.append(jnp.full(len(stack.sparse), tokens))
    return jnp.concatenate(counts)

  @nn.nowrap
  def move_router_state(
    self,
    router_state: dict[str, Any],
    load: Float32[Array, 'L E'],
    rate: Leaf | None = None,
  ) -> dict[str, Any]:
    """See `Model.move_router_state`."""
    if not router_state:
      return router_state
    moved, first = dict(router_state), 0
    for path, stack in self.stacks:
      rows = load[first : first + len(stack.sparse)]
      first += len(stack.sparse)
      if not path:
        return _moved_stack(stack, router_state, rows, rate)
      (name,) = path
      if name in moved:
        moved[name] = _moved_stack(stack, moved[name], rows, rate)
    return moved

  @nn.nowrap
  def layer_trees(self, collection: Mapping[str, Any]) -> tuple[Any, ...]:
    """See `Model.layer_trees`."""
    return tuple(
      layer
      for path, stack in self.stacks
      for layer in layer_trees(stack, _at(collection, path))
    )

  @nn.nowrap
  def place_of(self, path: Path) -> LayerPlace | None:
    """See `Model.place_of`."""
    places = (place_of(stack, own, path) for own, stack in self.stacks)
    return next((place for place in places if place is not None), None)

  @nn.nowrap
  def for_decoding(
    self,
    variables: dict[str, Any],
    *,
    batch_size: int = 1,
    platform: str = '',
    window: int = 0,
  ) -> tuple['Transformer', dict[str, Any]]:
    """See `Model.for_decoding`.

    Where an encoder's experts choose, they do as in training. Layers have
    arrays of their own; on a CPU, so have a stack's experts, where they are few
    and a step chooses few of them; see `layers/experts/few_tokens.py`.
    """
    if self.is_for_decoding:
      return self, variables
    params = dict(nn.meta.unbox(variables['params']))
    state = dict(variables.get(ROUTER_STATE, {}))
    on_cpu = (platform or jax.default_backend()) == 'cpu'
    stacks = []
    for path, stack in self.stacks:
      made = stack_for_decoding(
        stack,
        _at(params, path),
        _at(state, path),
        few_rows=batch_size if on_cpu else 0,
        window=window,
      )
      stacks.append(made.stack)
      params = _put(params, path, made.params)
      state = _put(state, path, made.router_state)
    return self.with_stacks(tuple(stacks)), as_variables(params, state)

  @property
  def is_for_decoding(self) -> bool:
    """See `Model.is_for_decoding`."""
    return not any(stack.stacked for _, stack in self.stacks)


def _at(tree: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
  for name in path:
    tree = tree.get(name, {})
  return tree


def _put(tree: dict[str, Any], path: Path, own: dict[str, Any]):
  if not path:
    return own
  (name,) = path
  return {**tree, name: own} if own else tree


def _moved_stack(stack, router_state, rows, rate):
  router = stack.experts.router

  def move(state, load):
    """A router's own variables are those that stand beside each other."""
    if any(not isinstance(value, Mapping) for value in state.values()):
      return router.move_state(state, load, rate)
    return {name: move(own, load) for name, own in state.items()}

  return map_layers(stack, router_state, rows, move)


def make_context(
  c: StackConfig,
  tokens: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'] | None,
  positions: Int[Array, 'B T'] | None,
) -> Context:
  """The context of a stack's blocks; defaults are those of `Decoder`."""
  B, T = tokens.shape
  token_mask = jnp.ones((B, T), bool)
  if segment_ids is not None:
    token_mask = segment_ids > 0
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  previous = hash_rule.previous_tokens(tokens, segment_ids)
  ids = hash_ids(c, tokens, previous, positions)
  return Context(segment_ids, token_mask, positions, hash_ids=ids)


def hash_ids(c: StackConfig, tokens, previous, positions) -> Array | None:
  """The numbers that routers hash tokens by; None where none does."""
  moe = c.experts
  return moe and moe.router.ids_of(tokens, previous, positions)


def make_cache(c: StackConfig, batch_size: int, max_len: int) -> KVCache:
  """An empty cache of a causal stack.

  Raises:
    ValueError: The stack does not decode; see `base.check_decodes`.
  """
  check_decodes(c.experts)
  attention = c.block.attention
  return KVCache.make(
    num_layers=len(c.sparse),
    stacked=c.stacked,
    batch_size=batch_size,
    max_len=max_len,
    num_heads=attention.num_kv_heads,
    head_width=attention.head_width,
    dtype=c.block.shared.dtype,
  )


def decode(
  embeddings: Embeddings,
  stack: Stack,
  tokens: Int[Array, 'B T'],
  token_mask: Bool[Array, 'B T'],
  cache: KVCache,
) -> tuple[Float32[Array, 'B T V'], KVCache]:
  """One step of a causal stack; see `Decoder.decode`."""
  cache, positions = cache.begin(token_mask)
  x = embeddings.embed(tokens, token_mask, positions, train=False)
  cache, previous = cache.follow(tokens, token_mask)
  ids = hash_ids(stack.config, tokens, previous, positions)
  context = Context(
    token_mask.astype(jnp.int32), token_mask, positions, hash_ids=ids
  )
  x, _, cache = stack(x, context, False, cache)
  return embeddings.logits(x), cache.advance(tokens.shape[1])
