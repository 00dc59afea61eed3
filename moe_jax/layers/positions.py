"""The kinds of positions by which a model can know the order of tokens.

Positions rotate queries and keys (rotary), are added to embeddings (learned,
sinusoidal), or bias the scores of attention (T5's relative positions).
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, cast

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.config import Kinds, Options, choice, option
from moe_jax.errors import InputError
from moe_jax.layers import parameters
from moe_jax.layers.rotary import SCALINGS, RotaryScaling, Unscaled
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Int32, checked


@dataclasses.dataclass(frozen=True)
class Positions(Options):
  """The base of kinds of positions; each overrides `rotate`, `add` or `bias`.

  Attributes:
    added: Whether a vector is added to embedded tokens.
    scaling: The change of rotations for long texts, in kinds that rotate.
  """

  added: ClassVar[bool] = False
  # This attribute has no annotation: with one it would be the first field of
  # `Rotary`, which has an option of this name.
  scaling = Unscaled()

  def within(self, max_len: int) -> 'Positions':
    """The options; `max_len` tokens replace 0 as a learned table's length."""
    return self

  def problems_with(
    self, head_width: int, causal: bool, name: str = 'head_width'
  ) -> Iterator[str]:
    """The reasons why attention layers cannot have these positions, as texts.

    Args:
      head_width: The width of the part of a head that may rotate.
      causal: Whether a token sees no later tokens.
      name: The name of the option that sets `head_width`.
    """
    return iter(())

  def rotate(
    self,
    x: Float[Array, 'B T H D'],
    positions: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B T H D']:
    """Queries or keys, rotated by positions in the kinds that rotate.

    Args:
      x: The queries or keys.
      positions: The position of each token in its document.
      segment_ids: The document of each token in its row; 0 is padding. None:
        each row is one document.
    """
    return x

  @property
  def table_len(self) -> int:
    """The number of rows of the table that `add` receives; 0: no table."""
    return 0

  def add(
    self,
    x: Float[Array, 'B T M'],
    tokens: Int[Array, 'B T'],
    token_mask: Bool[Array, 'B T'],
    positions: Int[Array, 'B T'],
    table: Float[Array, 'N M'] | None = None,
  ) -> Float[Array, 'B T M']:
    """Embedded tokens plus the vectors of positions in the kinds that add any.

    Args:
      x: The embedded tokens.
      tokens: The ids of the tokens.
      token_mask: False at padding.
      positions: The position of each token.
      table: The learned table; None where `table_len` is 0.
    """
    return x

  def bias(
    self, num_heads: int, causal: bool, name: str | None
  ) -> 'RelativePositionBias | None':
    """The module `name` whose bias [H, T, S] is added to scaled scores.

    None in kinds of positions without a bias. T counts queries, S keys, and
    H is `num_heads`; `causal` tells whether a token sees no later tokens.
    """
    return None


@dataclasses.dataclass(frozen=True)
class NoPositions(Positions):
  """A model that knows the order of tokens from its causal mask alone."""


@dataclasses.dataclass(frozen=True)
class Rotary(Positions):
  """Queries and keys are rotated by position (arXiv:2104.09864)."""

  theta: float = option(
    10_000.0,
    'Base of the wavelengths of rotary positions: pair i of the D/2 pairs of a '
    'head has a wavelength of 2 pi theta^(2 i / D) tokens.',
    above=0,
  )
  interleaved: bool = option(
    False,
    'Whether the pairs that rotate are neighbours (DeepSeek), not number i of '
    'each half of a head (Llama, Mixtral).',
  )
  fraction: float = option(
    1.0,
    'Fraction of the numbers of each head that rotate; the first numbers do.',
    above=0,
    maximum=1,
  )
  scaling: RotaryScaling = choice(  # pyright: ignore[reportIncompatibleVariableOverride]
    SCALINGS, 'none', 'Change of the rotation for long texts.'
  )

  def _width(self, head_width: int) -> int:
    """The number of dimensions of a head that rotate."""
    return int(head_width * self.fraction)

  def problems_with(self, head_width, causal, name='head_width'):
    """Yields a text if the rotated width is odd or 0, or misfits `scaling`.

    This width is `head_width` times the option `fraction`. The text calls the
    option of `head_width` by `name`; `causal` is not read.
    """
    width = self._width(head_width)
    if width % 2 or not width:
      factor = '' if self.fraction == 1 else f' * fraction={self.fraction}'
      yield f'{name}={head_width}{factor} must be even under rotary positions'
      return
    for problem in self.scaling.problems_with(self.theta, width):
      yield f'scaling: {problem}'

  def rotate(self, x, positions, segment_ids=None):
    """Rotates the P pairs of each head of x [B, T, H, D], in float32.

    P is half of the rotated width. The angles are those of `positions` [B, T];
    `segment_ids` [B, T] tell which documents are long. Source: Eq. 34 of
    arXiv:2104.09864, whose pair i is of dimensions (2 i, 2 i + 1); if not
    `interleaved`, pair i is of dimensions (i, i + P).
    """
    width = self._width(x.shape[-1])
    turns = self.scaling.turns(self.theta, width)
    frequency = jnp.asarray(turns.frequency)[None, None]
    factor = jnp.full((1, 1), turns.factor, jnp.float32)
    if (start := self.scaling.changes_at) is not None:
      long = self.scaling.turns(self.theta, width, long=True)
      is_long = _last_positions(positions, segment_ids) >= start  # [B, t]
      long_frequency = jnp.asarray(long.frequency)[None, None]
      frequency = jnp.where(is_long[..., None], long_frequency, frequency)
      factor = jnp.where(is_long, jnp.float32(long.factor), factor)
    angle = positions[..., None].astype(jnp.float32) * frequency  # [B, T, P]
    sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
    if start is not None or turns.factor != 1:
      sin, cos = sin * factor[..., None, None], cos * factor[..., None, None]
    x32 = x[..., :width].astype(jnp.float32)
    if self.interleaved:
      first, second = x32[..., 0::2], x32[..., 1::2]
    else:
      first, second = jnp.split(x32, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    join = jnp.stack if self.interleaved else jnp.concatenate
    y = join(rotated, axis=-1).reshape(x32.shape).astype(x.dtype)
    if width == x.shape[-1]:
      return y
    return jnp.concatenate([y, x[..., width:]], axis=-1)


def _last_positions(positions, segment_ids) -> Int[Array, 'B t']:
  """The last of the `positions` [B, T] in each token's segment, [B, T].

  Where `segment_ids` is None, it is the last one of each sequence, [B, 1].
  """
  if segment_ids is None:
    return positions.max(axis=1, keepdims=True)
  # The compiler fuses the comparison, so that no array [B, T, T] is stored.
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return jnp.where(same, positions[:, None, :], 0).max(axis=2)


@dataclasses.dataclass(frozen=True)
class Learned(Positions):
  """A learned vector for each position is added to the embedding."""

  added: ClassVar[bool] = True

  max_len: int = option(
    0,
    'Number of learned position vectors, and so the longest row that the model '
    'can read, in tokens; 0: data.seq_len.',
    minimum=0,
  )

  def within(self, max_len: int) -> 'Learned':
    return self if self.max_len else Learned(max_len)

  def shrunk(self) -> 'Learned':
    return Learned()

  @property
  def table_len(self) -> int:
    """The number of learned vectors; 0 before `within` has filled it in."""
    return self.max_len

  def add(self, x, tokens, token_mask, positions, table=None):
    """Adds the vectors of `positions` to x; ValueError where T > `max_len`."""
    # Only the length of whole rows is checked. A decoding step needs no check,
    # as its cache has no more slots than the table has positions.
    if positions.shape[1] > self.max_len:
      raise InputError(
        f'seq_len={positions.shape[1]} > max_len={self.max_len} of the learned '
        'positions'
      )
    learned = cast(Array, table)  # flax has made it, as `table_len` is not 0
    return x + jnp.take(learned, positions, axis=0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Positions):
  """Sines and cosines of the position are added to the embedding."""

  added: ClassVar[bool] = True

  offset: int = option(
    0,
    'Position of the first token of a row: 0, or in fairseq and NLLB the id of '
    'padding plus 1. Padding gets no sinusoid, nor does a token whose id is '
    'offset - 1.',
    minimum=0,
  )

  def add(self, x, tokens, token_mask, positions, table=None):
    """Adds to x [B, T, M] the `sinusoids` of `positions` [B, T] + `offset`.

    Padding gets none, nor do tokens whose id is `offset` - 1, which is that of
    padding in fairseq. `table` is not read.
    """
    vectors = sinusoids(positions + self.offset, x.shape[-1])
    has_position = token_mask & (tokens != self.offset - 1)
    return x + jnp.where(has_position[..., None], vectors, 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Relative(Positions):
  """A learned bias by distance is added to attention scores, as in T5."""

  buckets: int = option(
    32,
    'Number of buckets of relative positions: ranges of distances that have a '
    'bias of their own. In an encoder, half of them are for later tokens.',
    minimum=2,
  )
  max_distance: int = option(
    128,
    'Distance in tokens from which on all relative positions share the last '
    'bucket.',
    minimum=2,
  )

  def problems(self) -> Iterator[str]:
    """Yields a text if `max_distance` is at most half of `buckets`."""
    if self.buckets // 2 >= self.max_distance:
      most, N = self.max_distance, self.buckets
      yield f'max_distance={most} must be above half of buckets={N}'

  def problems_with(self, head_width, causal, name='head_width'):
    """Yields a text if an encoder (not `causal`) has fewer than 4 buckets."""
    if not causal and self.buckets < 4:
      yield f'buckets={self.buckets} must be at least 4 in an encoder'

  def bias(
    self, num_heads: int, causal: bool, name: str | None
  ) -> 'RelativePositionBias':
    return RelativePositionBias(self, num_heads, not causal, name=name)


class RelativePositionBias(nn.Module):
  """A learned bias for each head and range of distances, shared by all layers.

  Source: section 2.1 of arXiv:1910.10683 (T5).

  Attributes:
    options: The options, which set the number of buckets (ranges) and the
      distance from which on distances share a bucket.
    num_heads: The number H of heads.
    bidirectional: Whether half of the buckets are for later keys; if not, later
      keys have the bucket of distance 0, and causal attention hides them.
  """

  options: Relative
  num_heads: int
  bidirectional: bool

  @nn.compact
  def __call__(
    self, query_len: int, key_len: int, start: int | Int[Array, ''] = 0
  ) -> Float32[Array, 'H T S']:
    """The bias of T = `query_len` queries on S = `key_len` keys.

    Query t is at position start + t, and key s at position s.
    """
    init, axes = nn.initializers.normal(0.02), ('heads', 'buckets')
    init = parameters.boxed(init, axes, role='attention', form='table')
    shape = self.num_heads, self.options.buckets
    table = self.param('table', init, shape, jnp.float32)
    T, S = query_len, key_len
    # All differences of a key's and a query's position, in ascending order.
    delta = jnp.arange(T + S - 1, dtype=jnp.int32) - (T - 1) - start
    bias = jnp.take(table, self._bucket(delta), axis=1)  # [H, T + S - 1]
    return _toeplitz(bias, T, S)

  def _bucket(self, delta):
    N, longest = self.options.buckets, self.options.max_distance
    if self.bidirectional:
      N = N // 2
    bucket_table = distance_bucket(np.arange(longest + 1), N, longest)
    distance = jnp.abs(delta) if self.bidirectional else jnp.maximum(-delta, 0)
    bucket = jnp.take(bucket_table, jnp.minimum(distance, longest))
    if not self.bidirectional:
      return bucket
    return bucket + jnp.where(delta > 0, N, 0)


def _toeplitz(values, query_len, key_len) -> Float[Array, 'H T S']:
  """The array whose element [:, t, s] is values[:, s - t + T - 1].

  T is `query_len`, S is `key_len`, and the values are [H, T + S - 1].
  Neither this array nor its gradient needs a gather: the values, and a zero
  after them, are repeated in a line and cut into rows of the values' length,
  each of which begins one value earlier than the row before.
  """
  T, S = query_len, key_len
  H, n = values.shape
  rows = jnp.pad(values, ((0, 0), (0, 1)))
  rows = jnp.tile(rows, (1, T))[:, : T * n].reshape(H, T, n)
  return rows[:, :, T - 1 : T - 1 + S]


def distance_bucket(
  distance: Int[np.ndarray, ' N'], num_buckets: int, max_distance: int
) -> Int32[np.ndarray, ' N']:
  """The bucket of each distance; half of the buckets are for one distance each.

  The ranges of all other buckets grow logarithmically, and distances from
  `max_distance` on share the last bucket. Buckets are computed in float32, as
  in the training of public checkpoints, so that the first distance of a bucket
  can differ by one from that of exact arithmetic.
  """
  exact = num_buckets // 2
  share = np.log(np.maximum(distance, exact).astype(np.float32) / exact)
  share = share / np.float32(np.log(max_distance / exact))
  coarse = exact + (share * (num_buckets - exact)).astype(np.int32)
  bucket = np.where(distance < exact, distance, coarse)
  return np.minimum(bucket, num_buckets - 1).astype(np.int32)


POSITIONS = Kinds(
  'positions',
  Positions,
  {
    'rotary': Rotary,
    'learned': Learned,
    'relative': Relative,
    'sinusoidal': Sinusoidal,
    'none': NoPositions,
  },
)


@checked
def sinusoids(
  positions: Int[Array, 'B T'], width: int
) -> Float32[Array, 'B T M']:
  """Sines of M/2 wavelengths from 2 pi to 10000 * 2 pi, then their cosines.

  M is `width`. Source: tensor2tensor's and fairseq's arrangement of section 3.5
  of arXiv:1706.03762, which NLLB uses; an odd width ends in a zero.
  """
  half = width // 2
  step = np.log(10_000.0) / max(half - 1, 1)
  frequency = np.exp(np.arange(half, dtype=np.float32) * np.float32(-step))
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
  waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
  return jnp.pad(waves, ((0, 0), (0, 0), (0, width % 2)))
