"""Matrices of ternary weights in 16-bit codes: decoded, and multiplied by.

The codec is QMoE's (https://arxiv.org/abs/2310.16795, section 4), with the
dictionary of `ternary_dictionary.py`. A row is one output unit. Not here:
encoding (`compression/codec.py`), and checks of codes that were read from
somewhere (`ternary_checks.py`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.ternary_dictionary import (
  MOST_WEIGHTS,
  P0,
  WORD_WEIGHTS,
  dictionary,
)
from moe_jax.shapes import Array, Int8, Int32, UInt16


class Codes(NamedTuple):
  """The codes of a ternary matrix, or of one for each expert.

  The rows' codes follow each other without gaps. Where there are several
  experts, those with fewer codes are filled with code 0 behind their last row.

  Attributes:
    codes: The codes. Each row decodes to a whole number of pairs, so that a row
      of an odd width ends in a weight 0 that is not one of its own.
    offsets: The first code of each row, and the end of the last row. There are
      `rows` = R + 1 of them.
  """

  codes: UInt16[Array, '*E N']
  offsets: Int32[Array, '*E rows']


@functools.partial(jax.jit, static_argnames=('width', 'p0'))
def decode(codes: Codes, width: int, p0: float = P0) -> Int8[Array, '*E R M']:
  """The ternary weights, -1, 0 or 1, of every row.

  All shapes are static: only the number of rows, the width and the length of
  the array of codes matter, whatever the codes are. Damaged codes give wrong
  weights and no error.

  Args:
    codes: The codes, checked before (`ternary_checks.check`).
    width: The number M of weights of a row.
    p0: The probability of a zero of which the dictionary was made.
  """
  if codes.offsets.ndim > 1:
    return jax.vmap(lambda expert_codes: decode(expert_codes, width, p0))(codes)
  R, padded = codes.offsets.shape[0] - 1, width + width % 2
  lengths = jnp.asarray(dictionary(p0).lengths)[codes.codes]
  weights = jnp.zeros(MOST_WEIGHTS + R * padded, jnp.int8)
  weights = place_codes(codes.codes, jnp.cumsum(lengths), weights, p0)
  return weights[MOST_WEIGHTS:].reshape(R, padded)[:, :width]


def place_codes(
  codes: UInt16[Array, ' N'],
  ends: Int32[Array, ' N'],
  weights: Int8[Array, ' W'],
  p0: float,
) -> Int8[Array, ' W']:
  """`weights` plus those of codes that end before `ends`.

  A code is a window of 28 weights, which begins with zeros where the code is
  shorter; windows overlap and are added.

  Args:
    codes: The codes.
    ends: The position behind each code's last weight. A code whose window
      reaches past the end of `weights` is lost.
    weights: The weights so far, behind 28 that stand for no position.
    p0: The probability of a zero of which the dictionary was made.
  """
  last, first = (jnp.asarray(word)[codes] for word in dictionary(p0).words)
  shifts = 2 * jnp.arange(WORD_WEIGHTS - 1, -1, -1, dtype=jnp.uint32)
  bits = jnp.concatenate(
    [word[:, None] >> shifts[None] for word in (first, last)], axis=1
  ).astype(jnp.int8)  # [N, 28]
  return jax.lax.scatter_add(
    weights,
    ends[:, None],
    (bits & 1) - (bits & 2),
    jax.lax.ScatterDimensionNumbers(
      update_window_dims=(1,),
      inserted_window_dims=(),
      scatter_dims_to_operand_dims=(0,),
    ),
    mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
  )
