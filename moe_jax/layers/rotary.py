"""Rotary positions: queries and keys turn by their position."""

import jax.numpy as jnp

from moe_jax.layers.rotary_scaling import RotaryScaling
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float, Float32, Int


def turns_of(
  scaling: RotaryScaling,
  theta: float,
  width: int,
  positions: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'] | None = None,
) -> tuple[Float32[Array, 'b t P'], Float32[Array, 'b t'] | None]:
  """Frequencies of each token, or of all as one; the factors, or None for 1."""
  short = scaling.turns(theta, width)
  frequency = jnp.asarray(short.frequency)[None, None]
  factor = jnp.full((1, 1), short.factor, jnp.float32)
  if (long_turns := scaling.long_turns(theta, width)) is None:
    return frequency, None if short.factor == 1 else factor
  long_start, long = long_turns
  is_long = _last_positions(positions, segment_ids) >= long_start  # [B, t]
  long_frequency = jnp.asarray(long.frequency)[None, None]
  return (
    jnp.where(is_long[..., None], long_frequency, frequency),
    jnp.where(is_long, jnp.float32(long.factor), factor),
  )


def _last_positions(
  positions: Int[Array, 'B T'], segment_ids: Int[Array, 'B T'] | None
) -> Int[Array, 'B t']:
  """The last position in the segment of each token, or in each row."""
  if segment_ids is None:
    return positions.max(axis=1, keepdims=True)
  # The compiler fuses this, so that nothing of [B, T, T] is stored.
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return jnp.where(same, positions[:, None, :], 0).max(axis=2)


@checked
def rotate(
  x: Float[Array, 'B T H D'],
  angle: Float32[Array, 'B T P'],
  *,
  factor: Float32[Array, 'b t'] | None = None,
  interleaved: bool = False,
) -> Float[Array, 'B T H D']:
  """Rotates the P = D/2 pairs of each head by their angles, in float32.

  Source: Eq. 34 of arXiv:2104.09864, whose pairs are (2 i, 2 i + 1).

  Args:
    x: Queries or keys.
    angle: The angle of each pair in radians.
    factor: The factor of each token; None: 1.
    interleaved: Whether pairs are neighbours, as in the paper and in DeepSeek.
      If not, pair i is (i, i + P), as in the checkpoints of Llama and Mixtral.
  """
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
  if factor is not None:
    factor = factor[..., None, None]
    sin, cos = sin * factor, cos * factor
  x32 = x.astype(jnp.float32)
  if interleaved:
    first, second = x32[..., 0::2], x32[..., 1::2]
  else:
    first, second = jnp.split(x32, 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  if interleaved:
    return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
