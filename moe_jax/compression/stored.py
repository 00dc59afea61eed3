"""Kernels on a grid as the arrays in which a model stores them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np

from moe_jax.compression import codec
from moe_jax.compression.grids import Rounded
from moe_jax.kernels import quantized
from moe_jax.kernels.quantized import UniformGrid
from moe_jax.kernels.ternary import Codes
from moe_jax.layers.kernel_format import BITS, TERNARY, KernelFormat

_pack = jax.jit(quantized.pack, static_argnames='bits')


def store(
  kernels: Sequence[Rounded], format: KernelFormat
) -> tuple[list[dict[str, np.ndarray]], KernelFormat]:
  """The arrays that store some kernels, named as in `stored_arrays`.

  Args:
    kernels: Kernels of any shapes on grids of the format.
    format: The format.

  Returns:
    The arrays of each kernel, and the format with the number of codes that all
    of them need, where it has one.
  """
  if format.name == TERNARY:
    return _ternary(kernels, format)
  stored = []
  for kernel in kernels:
    grid = cast(UniformGrid, kernel.grid)
    codes = _pack(kernel.codes, BITS[format.name])
    arrays = {'codes': codes, 'scale': grid.scale, 'zero': grid.zero}
    stored.append(jax.tree.map(np.asarray, arrays))
  return stored, format


def _ternary(kernels, format):
  encoded: list[Codes] = [
    codec.encode(np.asarray(kernel.codes).swapaxes(-1, -2))
    for kernel in kernels
  ]
  longest = max(codes.codes.shape[-1] for codes in encoded)
  stored: list[dict[str, Any]] = []
  for kernel, codes in zip(kernels, encoded, strict=True):
    padding = longest - codes.codes.shape[-1]
    widths = [(0, 0)] * (codes.codes.ndim - 1) + [(0, padding)]
    stored.append(
      {
        'codes': np.pad(codes.codes, widths),
        'offsets': codes.offsets,
        'low': np.asarray(kernel.grid.low),
        'high': np.asarray(kernel.grid.high),
      }
    )
  return stored, dataclasses.replace(format, num_codes=longest)
