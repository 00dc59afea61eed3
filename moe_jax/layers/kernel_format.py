"""The format in which kernels are stored: as they are, or in codes of few bits.

Codes are decoded where a kernel is used, so that a model with such kernels is
small in memory too. `moe_jax.compression quantize` writes them; they are not
trained. Not here: how codes are chosen (`moe_jax.compression`), and what they
stand for (`kernels/quantized.py`, `kernels/ternary.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.kernels import quantized, ternary
from moe_jax.kernels.quantized import TernaryGrid, UniformGrid
from moe_jax.options import Options, at_least, one_of, option
from moe_jax.shapes import Array, Float32

BITS = {f'int{bits}': bits for bits in quantized.BITS}
TERNARY = 'ternary'
FORMATS = (*BITS, TERNARY)
_UNIFORM = {'name': tuple(BITS)}


class StoredArray(NamedTuple):
  """One of the arrays in which a kernel is stored.

  Attributes:
    shape: The shape of the array.
    dtype: The type of the array.
    form: The use of the array, one of `parameters.FORMS`.
  """

  shape: tuple[int, ...]
  dtype: str
  form: str


@dataclasses.dataclass(frozen=True)
class KernelFormat(Options):
  """The format of kernels [*E, I, O] of I inputs and O output units."""

  name: str = option(
    '',
    "Format in which kernels are stored: 'int8', 'int4', 'int3' or 'int2', of "
    "so many bits a weight; 'ternary', QMoE's codes of less than a bit where "
    "most weights are 0; or '', for numbers of the type param_dtype.",
    one_of('', *FORMATS),
  )
  group_size: int = option(
    0,
    'Number of inputs of an output unit that share a scale; groups are as even '
    'as can be, and no larger. 0: all inputs.',
    at_least(0),
    when=_UNIFORM,
  )
  symmetric: bool = option(
    False,
    'Whether values lie as far below 0 as above, so that no zero is stored.',
    when=_UNIFORM,
  )
  num_codes: int = option(
    0,
    'Number of 16-bit codes of each kernel, which the command that encodes '
    'them fills in; kernels of fewer codes are filled up. 0: not encoded yet.',
    at_least(0),
    when={'name': (TERNARY,)},
  )

  @property
  def is_plain(self) -> bool:
    """Whether kernels are stored as they are."""
    return not self.name

  def stored_arrays(self, shape: tuple[int, ...]) -> dict[str, StoredArray]:
    """The arrays that store a kernel [*E, I, O], in this format of codes."""
    *stack, inputs, units = shape
    if self.name == TERNARY:
      bound = StoredArray((*stack, 1, units), 'bfloat16', 'scale')
      return {
        'codes': StoredArray((*stack, self.num_codes), 'uint16', 'kernel'),
        'offsets': StoredArray((*stack, units + 1), 'int32', 'table'),
        'low': bound,
        'high': bound,
      }
    bits = BITS[self.name]
    rows = quantized.packed_rows(inputs, bits)
    group_shape = (*stack, quantized.num_groups(inputs, self.group_size), units)
    arrays = {
      'codes': StoredArray((*stack, rows, units), 'uint8', 'kernel'),
      'scale': StoredArray(group_shape, 'bfloat16', 'scale'),
    }
    if not self.symmetric:
      arrays['zero'] = StoredArray(group_shape, 'uint8', 'scale')
    return arrays

  def decoded(
    self, stored: Mapping[str, Array], inputs: int
  ) -> Float32[Array, '*E I O']:
    """The kernel that arrays store.

    Args:
      stored: The arrays, named as in `stored_arrays`.
      inputs: I, the number of inputs.
    """
    if self.name == TERNARY:
      codes = ternary.Codes(stored['codes'], stored['offsets'])
      signs = ternary.decode(codes, inputs).swapaxes(-1, -2)
      return TernaryGrid(stored['low'], stored['high']).values(signs)
    bits = BITS[self.name]
    zero = stored.get('zero')
    if zero is None:
      zero = jnp.full_like(stored['scale'], 2 ** (bits - 1), jnp.uint8)
    codes = quantized.unpack(stored['codes'], bits, inputs)
    return UniformGrid(stored['scale'], zero, bits).values(codes)
