"""The cache of a decoder: keys and values of every layer, between steps.

All rows append at the same slot, so that a step writes one slice in place;
rows of different length are padded in front. A layer whose tokens see a window
keeps as many slots as the window has tokens, and the newest token replaces the
oldest. Where layers run as a loop, they share an array; else each layer has its
own, which XLA's CPU compiler reads without a copy.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Bool, Float, Int, Int32, Leaf


class Slots(NamedTuple):
  """Keys and values of the slots of a cache, and of the newest tokens.

  The keys and values are those of one layer, or of all L layers of a decoder's
  attention to an encoder, where they are projections of the encoder's output.

  Attributes:
    key: The keys, [B, N, S, D] of N heads; those of all layers are
      [L, B, N, S, D], or L arrays.
    value: The values, [B, N, S, U] of width U, or those of all layers.
    filled: bool [B, S], whether the slot holds a token of the row; False at the
      encoder's padding.
    numbers: int32 [S], the index of each slot among all slots of a row; None
      for 0, 1, 2, ...
  """

  key: Leaf
  value: Leaf
  filled: Leaf
  numbers: Leaf | None = None

  def at(self, layer: int | Int[Array, '']) -> 'Slots':
    """The keys and values of one layer.

    The index may be traced where all layers share an array; where each layer
    has its own, it is a Python int.
    """

    def of_layer(cached):
      if isinstance(cached, tuple):
        return cached[layer]
      return jax.lax.dynamic_index_in_dim(cached, layer, 0, keepdims=False)

    return self._replace(key=of_layer(self.key), value=of_layer(self.value))


class KVCache(flax.struct.PyTreeNode):
  """The cache of a decoder: keys and values by slot, for each row (sequence).

  Attributes:
    key: The keys of N heads, [L, B, N, S, D], or L arrays [B, N, S, D]. A layer
      with a window may have fewer slots S, with slot s at index s % S. In
      latent attention, N is 1 and a key is a latent vector with its rotated
      key.
    value: The values, in the layout of the keys; in latent attention their
      width is 0.
    filled: bool [B, S], whether the slot holds a token of the row.
    length: int32 [], the slot that the next token takes.
    next_position: int32 [B], the position of each row's next token.
    last_token: int32 [B], the id of each row's newest token; -1: none yet.
    memory: The keys and values of an encoder's output, which steps do not
      change; None in a decoder-only model.
    task_ids: int32 [B], the task of each row; None where no router reads it.
  """

  key: Leaf
  value: Leaf
  filled: Leaf
  length: Leaf
  next_position: Leaf
  last_token: Leaf
  memory: Slots | None = None
  task_ids: Leaf = None

  @classmethod
  def make(
    cls,
    *,
    lengths: tuple[int, ...],
    stacked: bool,
    batch_size: int,
    max_len: int,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    dtype: str,
  ) -> 'KVCache':
    """An empty cache.

    Args:
      lengths: The number of slots that each layer keeps, which must be equal
        for all layers where `stacked`.
      stacked: Whether layers share an array.
      batch_size: The number of rows.
      max_len: The number of slots that all tokens of a row take.
      shapes: The number of heads and their width, of keys and then of values.
      dtype: The type of keys and values.
    """
    B, S = batch_size, max_len

    def empty(heads, width):
      if stacked:
        (length,) = set(lengths)
        return jnp.zeros((len(lengths), B, heads, length, width), dtype)
      return tuple(jnp.zeros((B, heads, s, width), dtype) for s in lengths)

    return cls(
      key=empty(*shapes[0]),
      value=empty(*shapes[1]),
      filled=jnp.zeros((B, S), bool),
      length=jnp.zeros((), jnp.int32),
      next_position=jnp.zeros(B, jnp.int32),
      last_token=jnp.full(B, -1, jnp.int32),
    )

  @property
  def max_len(self) -> int:
    """The number of tokens that a row may have."""
    return self.filled.shape[1]

  def begin(
    self, token_mask: Bool[Array, 'B T']
  ) -> tuple['KVCache', Int32[Array, 'B T']]:
    """Reserves the next T slots; also returns the positions of the new tokens.

    After this call each layer fills the slots by `append` or `write`, and
    `advance` ends the step. Padding, where `token_mask` is False, gets the
    position of the token before it in its row, or 0.
    """
    count = jnp.cumsum(token_mask.astype(jnp.int32), axis=1)
    positions = self.next_position[:, None] + count - 1
    start, next_position = (0, self.length), self.next_position + count[:, -1]
    filled = jax.lax.dynamic_update_slice(self.filled, token_mask, start)
    cache = self.replace(filled=filled, next_position=next_position)
    return cache, jnp.maximum(positions, 0)

  def follow(
    self, tokens: Int[Array, 'B T'], token_mask: Bool[Array, 'B T']
  ) -> tuple['KVCache', Int32[Array, 'B T']]:
    """Keeps each row's newest token id; also returns the id before each token.

    Routers by hash of bigrams read the latter; it is -1 before the first token
    of a row. Padding, where `token_mask` is False, may stand only in front of
    the new tokens.
    """
    last, tokens = self.last_token[:, None], tokens.astype(jnp.int32)
    tokens = jnp.where(token_mask, tokens, last)
    line = jnp.concatenate([last, tokens], axis=1)  # [B, 1 + T]
    return self.replace(last_token=line[:, -1]), line[:, :-1]

  def append(
    self,
    layer: int | Int[Array, ''],
    key: Float[Array, 'B T N D'],
    value: Float[Array, 'B T N U'],
  ) -> tuple['KVCache', Slots]:
    """Fills a layer's slots that `begin` reserved, for N heads of keys.

    The second result has all slots of the layer that the new tokens may see.
    `key` and `value` are those of the T new tokens. A step may have more tokens
    than a layer keeps slots: each token still sees the tokens of its window.
    """
    T, length = key.shape[1], self._num_slots(layer)
    if length == self.max_len:
      cache = self.write(layer, key, value)
      return cache, cache.slots(layer)
    if T == 1:
      cache = self.write(layer, key, value)
      numbers = _ring_numbers(self.length, length)
      return cache, self._numbered(*cache.slots(layer)[:2], numbers)
    first = self.length - length  # the index of the oldest slot
    key, value = (
      _in_order(old, new, self.length)
      for old, new in zip(self.slots(layer)[:2], (key, value))
    )
    numbers = first + jnp.arange(length + T, dtype=jnp.int32)
    cache = self.replace(
      key=_with_layer(self.key, layer, _as_ring(key, length, first + T)),
      value=_with_layer(self.value, layer, _as_ring(value, length, first + T)),
    )
    return cache, self._numbered(key, value, numbers)

  def _num_slots(self, layer: int | Int[Array, '']) -> int:
    """The number of slots that a layer keeps."""
    layer_keys = self.key[layer] if isinstance(self.key, tuple) else self.key
    return layer_keys.shape[-2]

  def slots(self, layer: int | Int[Array, '']) -> Slots:
    """The slots of one layer, in the order of its arrays, with `filled`."""
    return Slots(self.key, self.value, self.filled).at(layer)

  def _numbered(self, key, value, numbers: Int32[Array, ' S']) -> Slots:
    """The `Slots` of these keys [B, N, S, D] and values [B, N, S, U].

    `numbers` are the indices of their slots among all slots of a row. A slot
    whose index is below 0 holds no token yet.
    """
    filled = jnp.take(self.filled, jnp.maximum(numbers, 0), axis=1)
    return Slots(key, value, filled & (numbers >= 0)[None], numbers)

  def write(
    self,
    layer: int | Int[Array, ''],
    key: Float[Array, 'B T N D'],
    value: Float[Array, 'B T N U'],
  ) -> 'KVCache':
    """Writes keys and values of T new tokens of a layer to the next T slots.

    T must be 1 where the layer keeps fewer than `max_len` slots; `append` has
    no such limit.
    """
    slot = self.length
    if (length := self._num_slots(layer)) < self.max_len:
      slot = slot % length

    def fill(cached, new):
      new, start = new.swapaxes(1, 2), (0, 0, slot, 0)
      update = jax.lax.dynamic_update_slice
      if isinstance(cached, tuple):
        ring = update(cached[layer], new.astype(cached[layer].dtype), start)
        return _with_layer(cached, layer, ring)
      return update(cached, new[None].astype(cached.dtype), (layer, *start))

    return self.replace(key=fill(self.key, key), value=fill(self.value, value))

  def advance(self, num_tokens: int) -> 'KVCache':
    """The cache after a step of `num_tokens` tokens, written in all layers."""
    return self.replace(length=self.length + num_tokens)

  def take(self, rows: Int[Array, ' R']) -> 'KVCache':
    """The cache whose row (sequence) r is row `rows[r]` of this cache.

    Beam search calls this method: its beams move between rows, and begin with
    the row of their prompt.
    """

    def taken(leaf):
      # Keys and values are [*L, B, N, S, D], other leaves [B, ...] or `length`.
      axis = max(leaf.ndim - 4, 0)
      return jnp.take(leaf, rows, axis) if leaf.ndim else leaf

    return jax.tree.map(taken, self)


def _ring_numbers(newest: Int[Array, ''], length: int) -> Int32[Array, ' S']:
  """The index of the slot at each place of a ring, below 0 if it is empty.

  A ring is the cache of a layer with a window: slot s is at place s % S.

  Args:
    newest: The index of the newest slot.
    length: S, the number of slots that the ring keeps.
  """
  ring_index = jnp.arange(length, dtype=jnp.int32)
  return newest - (newest - ring_index) % length


def _in_order(ring, new, length) -> Float[Array, 'B N _ D']:
  """The slots of a ring [B, N, S, D], the oldest first, then the new slots.

  Args:
    ring: The keys or values of a layer with a window; slot s is at s % S.
    new: The keys or values of new tokens, [B, T, N, D].
    length: The index of the first new slot.
  """
  old = jnp.roll(ring, -(length % ring.shape[2]), axis=2)
  return jnp.concatenate([old, new.swapaxes(1, 2).astype(old.dtype)], axis=2)


def _as_ring(x, length, first) -> Float[Array, 'B N S D']:
  """The last `length` slots of x [B, N, _, D] as a ring of S = `length` places.

  Slot s is at place s % S. `first` is the index of the first of these slots.
  """
  return jnp.roll(x[:, :, x.shape[2] - length :], first % length, axis=2)


def _with_layer(cached, layer, layer_array):
  """Keys or values with `layer_array` [B, N, S, D] as the array of one layer.

  `cached` has those of all layers: one array [L, B, N, S, D], or L arrays.
  """
  if isinstance(cached, tuple):
    return (*cached[:layer], layer_array, *cached[layer + 1 :])
  return jax.lax.dynamic_update_index_in_dim(cached, layer_array, layer, 0)
