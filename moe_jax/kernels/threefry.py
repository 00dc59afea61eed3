"""Random bits of JAX's default generator, as straight code.

JAX lowers Threefry-2x32 (Salmon et al., 2011) for CPUs to a loop over groups of
rounds, which copies its arrays in each; written out, the rounds are one pass
over the result. The compiler would make that pass again inside each consumer of
the bits, forward and backward; large arrays are therefore written by a loop of
two rounds, one for each half of the columns, whose result it has to keep. The
bits are the same. On other platforms JAX writes the rounds out itself.
"""

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np

from moe_jax.shapes import Array, PRNGKey, UInt32

_JAXS = jax.extend.random.threefry_prng_impl
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Smaller arrays are as quick to compute again.
_LEAST_IN_LOOP = 2**16
_PARITY = np.uint32(0x1BD11BDA)


def _threefry(
  key: UInt32[Array, '2'], high: UInt32[Array, '*N'], low: UInt32[Array, '*N']
) -> tuple[UInt32[Array, '*N'], UInt32[Array, '*N']]:
  """Threefry-2x32 with 20 rounds, of pairs of counters."""
  keys = key[0], key[1], key[0] ^ key[1] ^ _PARITY
  high, low = high + keys[0], low + keys[1]
  for i in range(5):
    for r in _ROTATIONS[i % 2]:
      high = high + low
      low = ((low << np.uint32(r)) | (low >> np.uint32(32 - r))) ^ high
    high = high + keys[(i + 1) % 3]
    low = low + keys[(i + 2) % 3] + np.uint32(i + 1)
  return high, low


def _random_bits(key, bit_width, shape):
  """The random bits; JAX's own function where the counters need 64 bits."""
  size = int(np.prod(shape))
  plain = bit_width == 32 and size < 2**32
  if not (plain and jax.config.values['jax_threefry_partitionable']):
    return _JAXS.random_bits(key, bit_width, shape)
  # Devices that share the array could not split a loop over its columns.
  in_loop = size >= _LEAST_IN_LOOP and jax.device_count() == 1
  if not in_loop or shape[-1] % 2:
    return _columns(key, shape, 0, shape[-1] if shape else 0)
  half = shape[-1] // 2

  def body(i, bits):
    part = _columns(key, shape, (i * half).astype(jnp.uint32), half)
    return jax.lax.dynamic_update_slice_in_dim(bits, part, i * half, -1)

  return jax.lax.fori_loop(0, 2, body, jnp.zeros(shape, jnp.uint32))


def _columns(key, shape, first, width):
  """The bits of `width` columns of an array of that shape, from `first` on."""
  part_shape = (*shape[:-1], width) if shape else shape
  low, stride = jnp.zeros(part_shape, jnp.uint32), 1
  # A sum over dimensions, which devices that share the array can split.
  for dim in reversed(range(len(shape))):
    index = jax.lax.broadcasted_iota(jnp.uint32, part_shape, dim)
    if dim == len(shape) - 1:
      index = index + jnp.uint32(first)
    low = low + index * np.uint32(stride % 2**32)
    stride *= shape[dim]
  high, low = _threefry(key, jnp.zeros(part_shape, jnp.uint32), low)
  return high ^ low


UNROLLED = jax.extend.random.define_prng_impl(
  key_shape=_JAXS.key_shape,
  seed=_JAXS.seed,
  split=_JAXS.split,
  random_bits=_random_bits,
  fold_in=_JAXS.fold_in,
  name='threefry2x32_unrolled',
  tag='fru',
)


def key(seed: UInt32[Array, '']) -> PRNGKey:
  """The key of `jax.random.key(seed)`, whose bits are quick to draw on a CPU.

  A generator that the user has chosen is kept.
  """
  chosen = jax.config.values['jax_default_prng_impl']
  unrolled = chosen == _JAXS.name and jax.default_backend() == 'cpu'
  return jax.random.key(seed, impl=UNROLLED if unrolled else None)
