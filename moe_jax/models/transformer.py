"""The base of models of stacks of blocks, and their decoding steps."""

from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.block import Context
from moe_jax.layers.imposed import check_given
from moe_jax.layers.routers.contract import ROUTER_STATE, TokenInfo
from moe_jax.models.base import Batch, check_decodes
from moe_jax.models.decoding import stack_for_decoding
from moe_jax.models.layer_trees import (
  LayerPlace,
  Path,
  layer_trees,
  map_layers,
  place_of,
)
from moe_jax.models.router_state import variables as as_variables
from moe_jax.models.stack import StackConfig
from moe_jax.models.text_model import TextModel
from moe_jax.routing import GivenChoices, rules_without_logits
from moe_jax.shapes import Array, Bool, Float32, Int, checked


class Transformer(TextModel):
  """The base of models of stacks of blocks.

  A subclass's `setup` makes `embeddings` and `decoder`, the causal stack that
  generates.
  """

  @checked
  def decode(
    self,
    tokens: Int[Array, 'B T'],
    token_mask: Bool[Array, 'B T'],
    cache: KVCache,
  ) -> tuple[Float32[Array, 'B T V'], KVCache]:
    """Logits of the tokens that follow those of the cache, which they join.

    Args:
      tokens: Token ids; a row's first ones may be padding.
      token_mask: False at padding.
      cache: The cache from `make_cache`, from `encode` or from an earlier call;
        the caller checks that the tokens fit into it, and puts `task_ids` into
        it if the decoder routes by task.
    """
    cache, positions = cache.begin(token_mask)
    x = self.embeddings.embed(tokens, token_mask, positions, train=False)
    cache, previous = cache.follow(tokens, token_mask)
    segment_ids, task_ids = token_mask.astype(jnp.int32), None
    if cache.task_ids is not None:
      task_ids = jnp.broadcast_to(cache.task_ids[:, None], tokens.shape)
    info = TokenInfo(tokens, previous, positions, segment_ids, task_ids)
    context = Context(
      segment_ids,
      token_mask,
      positions,
      token_info=_read_by(self.decoder.config, info),
    )
    x, _, cache = self.decoder(x, context, False, cache)
    return self.embeddings.logits(x), cache.advance(tokens.shape[1])

  @property
  def task_sequences(self) -> tuple[str, ...]:
    return tuple(
      prefix
      for prefix, (_, stack) in zip(self.sequences, self.stacks, strict=True)
      if stack.experts is not None and 'task_ids' in stack.experts.router.reads
    )

  @property
  def num_tasks(self) -> int:
    return max(stack.block.shared.num_tasks for _, stack in self.stacks)

  @nn.nowrap
  def with_stacks(self, stacks: tuple[StackConfig, ...]) -> Self:
    """The same model with these stacks in the place of `stacks`."""
    raise NotImplementedError

  @nn.nowrap
  def routed_tokens(self, batch: Batch) -> Float32[Array, ' L']:
    counts = []
    for prefix, (_, stack) in zip(self.sequences, self.stacks, strict=True):
      routed = stack.padding.routed(batch[f'{prefix}segment_ids'])
      tokens = jnp.maximum(routed.sum().astype(jnp.float32), 1.0)
      counts.append(jnp.full(len(stack.sparse), tokens))
    return jnp.concatenate(counts)

  @nn.nowrap
  def move_router_state(self, router_state, load, rate=None):
    if not router_state:
      return router_state
    new_state, first = dict(router_state), 0
    for path, stack in self.stacks:
      rows = load[first : first + len(stack.sparse)]
      first += len(stack.sparse)
      if not path:
        return _moved_stack(stack, router_state, rows, rate)
      (name,) = path
      if name in new_state:
        new_state[name] = _moved_stack(stack, new_state[name], rows, rate)
    return new_state

  @nn.nowrap
  def layer_trees(self, collection: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
      layer
      for path, stack in self.stacks
      for layer in layer_trees(stack, _subtree(collection, path))
    )

  @nn.nowrap
  def place_of(self, path: Path) -> LayerPlace | None:
    layer_places = (
      place_of(stack, stack_path, path) for stack_path, stack in self.stacks
    )
    return next((p for p in layer_places if p is not None), None)

  @nn.nowrap
  def for_decoding(self, variables, *, batch_size=1, platform='', window=0):
    """Each layer gets arrays of its own.

    On a CPU, so does each expert of a stack, if there are few and a step
    chooses few of them; see `layers/experts/few_tokens.py`. An encoder's
    experts that choose tokens do so as in training.
    """
    if self.is_for_decoding:
      return self, variables
    params = dict(nn.meta.unbox(variables['params']))
    state = dict(variables.get(ROUTER_STATE, {}))
    on_cpu = (platform or jax.default_backend()) == 'cpu'
    stacks = []
    for path, stack in self.stacks:
      decoding = stack_for_decoding(
        stack,
        _subtree(params, path),
        _subtree(state, path),
        few_rows=batch_size if on_cpu else 0,
        window=window,
      )
      stacks.append(decoding.stack)
      params = _with_subtree(params, path, decoding.params)
      state = _with_subtree(state, path, decoding.router_state)
    return self.with_stacks(tuple(stacks)), as_variables(params, state)

  @property
  def is_for_decoding(self) -> bool:
    return not any(stack.stacked for _, stack in self.stacks)


def _subtree(tree: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
  for name in path:
    tree = tree.get(name, {})
  return tree


def _with_subtree(tree: dict[str, Any], path: Path, subtree: dict[str, Any]):
  if not path:
    return subtree
  (name,) = path
  return {**tree, name: subtree} if subtree else tree


def _moved_stack(stack, router_state, rows, rate):
  router = stack.experts.router

  def move(state, load):
    """Moves a router's state, the highest level of the tree with arrays."""
    if any(not isinstance(value, Mapping) for value in state.values()):
      return router.move_state(state, load, rate)
    return {name: move(substate, load) for name, substate in state.items()}

  return map_layers(stack, router_state, rows, move)


def make_context(
  c: StackConfig,
  tokens: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'] | None,
  positions: Int[Array, 'B T'] | None,
  task_ids: Int[Array, 'B T'] | None = None,
  given: GivenChoices | None = None,
) -> Context:
  """The context of a stack's blocks; defaults are as in `Decoder`.

  Raises:
    ValueError: The choices that are imposed are not those of the stack's sparse
      layers.
  """
  B, T = tokens.shape
  token_mask = jnp.ones((B, T), bool)
  if segment_ids is not None:
    token_mask = segment_ids > 0
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  previous = rules_without_logits.previous_tokens(tokens, segment_ids)
  segments = (
    token_mask.astype(jnp.int32) if segment_ids is None else segment_ids
  )
  info = TokenInfo(tokens, previous, positions, segments, task_ids)
  check_given(given, c.sparse if c.experts else ())
  return Context(
    segment_ids,
    token_mask,
    positions,
    token_info=_read_by(c, info),
    given=given,
  )


def _read_by(c: StackConfig, info: TokenInfo) -> TokenInfo:
  """The arrays that the routers of a stack read; the others are None."""
  return info.only(c.experts.router.reads if c.experts else ())


def make_cache(c: StackConfig, batch_size: int, max_len: int) -> KVCache:
  """An empty cache of a causal stack.

  Raises:
    ValueError: The stack does not decode; see `base.check_decodes`.
  """
  check_decodes(c.experts)
  return KVCache.make(
    lengths=c.cache_lengths(max_len),
    stacked=c.stacked,
    batch_size=batch_size,
    max_len=max_len,
    shapes=c.block.attention.cached_shapes,
    dtype=c.block.shared.dtype,
  )
