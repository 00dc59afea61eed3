"""The formats in which the kernels of experts are stored in codes of few bits.

Codes are decoded where a kernel is used, so that a model with such kernels is
small in memory too. `moe_jax.compression quantize` writes them; they are not
trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.kernels import quantized, ternary
from moe_jax.kernels.quantized import TernaryGrid, UniformGrid
from moe_jax.options import Options, at_least, one_of, option
from moe_jax.shapes import Array, Float32

BITS = {f'int{bits}': bits for bits in quantized.BITS}
TERNARY = 'ternary'
FORMATS = (*BITS, TERNARY)


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
    'int8',
    "Format in which kernels are stored: 'int8', 'int4' or 'int2', of so many "
    "bits a weight; or 'ternary', QMoE's codes of less than a bit where most "
    'weights are 0.',
    one_of(*FORMATS),
  )
  num_codes: int = option(
    0,
    'Number of 16-bit codes of each kernel, which the command that encodes '
    'them fills in; kernels of fewer codes are filled up. 0: not encoded yet.',
    at_least(0),
    when={'name': (TERNARY,)},
  )

  def stored_arrays(self, shape: tuple[int, ...]) -> dict[str, StoredArray]:
    """The arrays that store a kernel [*E, I, O], in this format."""
    *stack, inputs, units = shape
    by_unit = (*stack, 1, units)
    if self.name == TERNARY:
      bound = StoredArray(by_unit, 'bfloat16', 'scale')
      return {
        'codes': StoredArray((*stack, self.num_codes), 'uint16', 'kernel'),
        'offsets': StoredArray((*stack, units + 1), 'int32', 'table'),
        'low': bound,
        'high': bound,
      }
    rows = quantized.packed_rows(inputs, BITS[self.name])
    return {
      'codes': StoredArray((*stack, rows, units), 'uint8', 'kernel'),
      'scale': StoredArray(by_unit, 'bfloat16', 'scale'),
      'zero': StoredArray(by_unit, 'uint8', 'scale'),
    }

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
    codes = quantized.unpack(stored['codes'], bits, inputs)
    return UniformGrid(stored['scale'], stored['zero'], bits).values(codes)
