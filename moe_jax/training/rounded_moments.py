"""Adam whose moments are kept in bfloat16, rounded up or down at random.

Such moments take half the bytes of float32 moments. Rounded to the nearest, a
moment would not move at all where its change is less than half a unit in its
last place, as the change of the second moment is at b2 = 0.999; rounded at
random a moment is right on average.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.partitioning import path_name
from moe_jax.shapes import Array, BFloat16, Float32, Int32, UInt32


def scale_by_adam(
  b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
  """Adam's transformation; its state is optax's, with moments in bfloat16.

  The update is computed from the rounded moments, so it reads half the bytes.
  The noise is a function of the number of the step, of the parameter's name and
  of the element's index: a resumed run repeats it, and so does another mesh.

  Args:
    b1: Decay per step of the first moment.
    b2: Decay per step of the second moment.
    epsilon: Number that is added to the root of the second moment.
  """

  def init(params):
    # The two trees share no array, as both are donated to a step.
    zeros_like = optax.tree_utils.tree_zeros_like
    mu = zeros_like(params, jnp.bfloat16)
    nu = zeros_like(params, jnp.bfloat16)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

  def update(updates, state, params=None):
    count = jnp.asarray(optax.safe_increment(state.count))

    def moment_update(decay, power):
      def update_leaf(path, g, old):
        name = f'{path_name(path)} {power}'
        g, old = g.astype(jnp.float32), old.astype(jnp.float32)
        new = decay * old + (1 - decay) * g**power
        return rounded(new, noise(name, count, new.shape))

      return update_leaf

    def direction(g, m, v):
      m = m.astype(jnp.float32) / (1 - b1**count)
      v = v.astype(jnp.float32) / (1 - b2**count)
      return (m / (jnp.sqrt(v) + epsilon)).astype(g.dtype)

    with_path = jax.tree_util.tree_map_with_path
    mu = with_path(moment_update(b1, 1), updates, state.mu)
    nu = with_path(moment_update(b2, 2), updates, state.nu)
    updates = jax.tree.map(direction, updates, mu, nu)
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def rounded(
  x: Float32[Array, '*N'], noise: UInt32[Array, '*N']
) -> BFloat16[Array, '*N']:
  """Rounds numbers up or down in bfloat16, so that the mean result is x.

  Args:
    x: Numbers; infinities and NaN are kept.
    noise: Random numbers, of which the 16 lowest bits count.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # The more the 16 bits that are cut off come to, the likelier noise makes them
  # carry, which gives the next number in bfloat16, away from zero.
  high = (bits + (noise & np.uint32(0xFFFF))) >> np.uint32(16)
  near = jax.lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), near, x.astype(jnp.bfloat16))


def noise(
  name: str, count: Int32[Array, ''], shape: tuple[int, ...]
) -> UInt32[Array, '*N']:
  """Random bits for each element, a hash of its index and of a seed.

  JAX's own generator would take longer than all other work of the update.

  Args:
    name: A name, on which the seed depends.
    count: The number of the step, on which the seed depends, too.
    shape: The shape of the array of bits.
  """
  name_hash = np.uint32(zlib.crc32(name.encode()))
  seed = _hash(_hash(count.astype(jnp.uint32)) ^ name_hash)
  index, stride = jnp.zeros(shape, jnp.uint32), 1
  for dim in reversed(range(len(shape))):
    coordinate = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    index = index + coordinate * np.uint32(stride % 2**32)
    stride *= shape[dim]
  return _hash(index + seed)


def _hash(x: UInt32[Array, '*N']) -> UInt32[Array, '*N']:
  """Hashes each number by "lowbias32" of nullprogram.com/blog/2018/07/31."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
  return x ^ (x >> np.uint32(16))
