"""Quantised kernels of experts: grids, rounding, storage and decoding.

A quantised weight is a code, an integer of few bits; a grid says which number
each code stands for. A kernel is [*E, I, O], for I inputs and O output units;
an output unit is a row in papers on quantisation. Codes are decoded where a
kernel is used, so that a model with such kernels is small in memory too.
`moe_jax.compression quantize` writes quantised kernels; they are not trained.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Options, option
from moe_jax.kernels import ternary
from moe_jax.shapes import Array, Float, Float32, Int8, UInt8, checked

# The number of bits of a code, by format; 8 // bits codes share a byte.
BITS = {'int8': 8, 'int4': 4, 'int2': 2}
TERNARY = 'ternary'
FORMATS = (*BITS, TERNARY)
# Arrays [*E, 1, O] by name, which say what number each code of a kernel
# [*E, I, O] stands for.
Grid = Mapping[str, Array]


@functools.partial(jax.jit, static_argnames='bits')
def pack(codes: UInt8[Array, '*E I O'], bits: int) -> UInt8[Array, '*E P O']:
  """Puts 8 // bits codes of an output unit into each of its P bytes."""
  per_byte = 8 // bits
  padding = [(0, 0)] * (codes.ndim - 2) + [(0, -codes.shape[-2] % per_byte)]
  codes = jnp.pad(codes, [*padding, (0, 0)])
  *stack, inputs, units = codes.shape
  codes = codes.reshape(*stack, inputs // per_byte, per_byte, units)
  # No two of the shifted codes have a bit in common.
  return (codes << _shifts(bits, codes.ndim)).sum(-2, dtype=jnp.uint8)


def unpack(
  packed: UInt8[Array, '*E P O'], bits: int, inputs: int
) -> UInt8[Array, '*E I O']:
  """The codes that `pack` put into bytes, without padding; I is `inputs`."""
  *stack, rows, units = packed.shape
  codes = packed[..., None, :]
  codes = codes >> _shifts(bits, codes.ndim) & (1 << bits) - 1
  codes = codes.reshape(*stack, rows * (8 // bits), units)
  return codes[..., :inputs, :]


def _shifts(bits: int, ndim: int) -> UInt8[Array, '...']:
  """The shift in bits of each code of a byte, on axis -2 of `ndim` axes."""
  shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
  return shifts.reshape(*(1,) * (ndim - 2), -1, 1)


class StoredArray(NamedTuple):
  """One of the arrays in which a kernel is stored.

  Attributes:
    shape: The shape of the array.
    dtype: The type of the array.
    form: The use of the array: 'kernel' for codes, 'scale' for the grid, or
      'table' for an array of indices, as in `layers.parameters.Role`.
  """

  shape: tuple[int, ...]
  dtype: str
  form: str


@dataclasses.dataclass(frozen=True)
class KernelFormat(Options):
  """The format of kernels [*E, I, O] of I inputs and O output units."""

  name: str = option(
    'int8',
    "Format in which kernels are stored: 'int8', 'int4' or 'int2', of so many "
    "bits a weight; or 'ternary', QMoE's codes of less than a bit where most "
    'weights are 0.',
    choices=FORMATS,
  )
  num_codes: int = option(
    0,
    'Number of 16-bit codes of each kernel, which the command that encodes '
    'them fills in; kernels of fewer codes are filled up. 0: not encoded yet.',
    minimum=0,
  )

  def stored_arrays(self, shape: tuple[int, ...]) -> dict[str, StoredArray]:
    """The arrays that store a kernel of this shape, [*E, I, O], by name.

    They are 'codes', with 'scale' and 'zero' as the grid or, if it is ternary,
    with 'low' and 'high' as the grid, and 'offsets', where rows of codes begin.
    """
    *stack, inputs, units = shape
    by_unit = (*stack, 1, units)
    if self.name == TERNARY:
      bound = StoredArray(by_unit, 'bfloat16', 'scale')
      codes = StoredArray((*stack, self.num_codes), 'uint16', 'kernel')
      offsets = StoredArray((*stack, units + 1), 'int32', 'table')
      return {'codes': codes, 'offsets': offsets, 'low': bound, 'high': bound}
    rows = -(-inputs * BITS[self.name] // 8)
    return {
      'codes': StoredArray((*stack, rows, units), 'uint8', 'kernel'),
      'scale': StoredArray(by_unit, 'bfloat16', 'scale'),
      'zero': StoredArray(by_unit, 'uint8', 'scale'),
    }

  @checked
  def grid(self, w: Float[Array, '*E I O']) -> Grid:
    """The grid of kernels, from the weights of each output unit alone.

    The values of a ternary grid are {'low', 0, 'high'}, the least and the
    greatest weight (QMoE). The values of other grids are 'scale' * (code -
    'zero'), at equal distances between the least and the greatest weight: one
    value is 0, and no weight is off by more than half a distance. Distances are
    rounded up to a bfloat16.
    """
    w = w.astype(jnp.float32)
    low = jnp.minimum(w.min(-2, keepdims=True), 0.0)
    high = jnp.maximum(w.max(-2, keepdims=True), 0.0)
    if self.name == TERNARY:
      bounds = {'low': low, 'high': high}
      return {name: x.astype(jnp.bfloat16) for name, x in bounds.items()}
    exact = (high - low) / (2 ** BITS[self.name] - 1)
    near = exact.astype(jnp.bfloat16)
    above = jnp.nextafter(near, jnp.array(jnp.inf, jnp.bfloat16))
    scale = jnp.where(near.astype(jnp.float32) < exact, above, near)
    scale = jnp.where(scale > 0, scale, jnp.bfloat16(1))
    zero = jnp.round(-low / scale.astype(jnp.float32))
    return {'scale': scale, 'zero': zero.astype(jnp.uint8)}

  def codes(
    self, w: Float[Array, '*E I O'], grid: Grid
  ) -> Int8[Array, '*E I O'] | UInt8[Array, '*E I O']:
    """The code of the number of the grid that is nearest to each weight.

    The codes of a ternary grid are -1, 0 and 1, and 0 where two numbers
    are equally near.
    """
    w = w.astype(jnp.float32)
    first, second = self._bounds(grid)
    if self.name == TERNARY:
      below, above = w < first / 2, w > second / 2
      return above.astype(jnp.int8) - below.astype(jnp.int8)
    codes = jnp.round(w / first) + second
    return jnp.clip(codes, 0, 2 ** BITS[self.name] - 1).astype(jnp.uint8)

  def values(
    self, codes: Int8[Array, '*E I O'] | UInt8[Array, '*E I O'], grid: Grid
  ) -> Float32[Array, '*E I O']:
    """The numbers of the grid that codes stand for."""
    first, second = self._bounds(grid)
    if self.name == TERNARY:
      return jnp.where(codes > 0, second, jnp.where(codes < 0, first, 0.0))
    return first * (codes.astype(jnp.float32) - second)

  def _bounds(self, grid: Grid) -> list[Array]:
    """'low' and 'high' of a ternary grid, 'scale' and 'zero' of others."""
    names = ('low', 'high') if self.name == TERNARY else ('scale', 'zero')
    return [grid[name].astype(jnp.float32) for name in names]

  def store(self, codes: Array, grid: Grid) -> dict[str, np.ndarray]:
    """The arrays that store kernels, named as in `stored_arrays`.

    The number of 16-bit codes of ternary kernels depends on their weights, and
    is not yet `num_codes`: `fill_up` makes it equal for all kernels of a model.

    Args:
      codes: The code of each weight, [*E, I, O], as `codes` returns them.
      grid: The grid of the codes.
    """
    if self.name == TERNARY:
      rows = np.asarray(codes).swapaxes(-1, -2)
      arrays = {**ternary.encode(rows)._asdict(), **grid}
    else:
      arrays = {'codes': pack(codes, BITS[self.name]), **grid}
    return {name: np.asarray(x) for name, x in arrays.items()}

  def decoded(
    self, stored: Mapping[str, Array], inputs: int
  ) -> Float32[Array, '*E I O']:
    """The kernel that the stored arrays stand for.

    Args:
      stored: The arrays, named as in `stored_arrays`.
      inputs: I, the number of inputs.
    """
    if self.name == TERNARY:
      codes = ternary.Codes(stored['codes'], stored['offsets'])
      weights = ternary.decode(codes, inputs).swapaxes(-1, -2)
    else:
      weights = unpack(stored['codes'], BITS[self.name], inputs)
    return self.values(weights, stored)

  def decoded_experts(self, p: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of feed-forward experts with their kernels decoded.

    Args:
      p: The parameters; each kernel is a mapping of arrays, named as in
        `stored_arrays`.
    """
    # A kernel has as many inputs as the kernel before it has output units.
    bound = 'low' if self.name == TERNARY else 'scale'
    inputs = {
      name: p['w_in' if name == 'w_out' else 'w_out'][bound].shape[-1]
      for name, stored in p.items()
      if isinstance(stored, Mapping)
    }
    return {**p, **{n: self.decoded(p[n], i) for n, i in inputs.items()}}


def fill_up(stored: Iterable[dict[str, Any]]) -> int:
  """Pads ternary kernels in place to the number of codes of the longest kernel.

  Returns this number, which is the option `KernelFormat.num_codes`. Each of
  `stored` has the arrays of one kernel, as `KernelFormat.store` returns them.
  """
  stored = list(stored)
  num_codes = max(arrays['codes'].shape[-1] for arrays in stored)
  for arrays in stored:
    codes = arrays['codes']
    added = [(0, 0)] * (codes.ndim - 1) + [(0, num_codes - codes.shape[-1])]
    arrays['codes'] = np.pad(codes, added)
  return num_codes
