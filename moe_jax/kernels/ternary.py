"""Ternary weights in 16-bit codes, each for a sequence of weights, as in QMoE.

A weight is 0 with probability `P0`, and 1 or -1 with (1 - P0) / 2 each. The
dictionary has the 2^16 most probable sequences of whole pairs of weights, 14
pairs at most (https://arxiv.org/abs/2310.16795, section 4). A sequence is less
probable than any that it begins with, so the dictionary has all of those too,
and the greedy parse of a row never fails.

The paper pops the sequences from a heap. Here they are counted instead: all
sequences of one length and one number of non-zeros are equally probable, which
makes them a class, and the dictionary has the classes in order of probability.
Classes of equal probability are ordered by length, then by non-zeros; sequences
of a class by their weights in the order 0, 1, -1.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.shapes import Array, Int8, Int32, UInt16

NUM_CODES = 1 << 16
MOST_PAIRS = 14
MOST_WEIGHTS = 2 * MOST_PAIRS
# The share of zeros that the paper's table was made for.
P0 = 0.885
# The number of rows of weights that are parsed together. The entries of the
# dictionary that so many rows need stay in the cache.
ROWS = 4096


class Dictionary(NamedTuple):
  """The dictionary from 16-bit codes to sequences of weights, as arrays.

  The arrays must not be written to.

  Attributes:
    weights: int8 [2^16, 28], the sequence of weights that each code stands for,
      with zeros in front of a sequence of fewer than 28 weights.
    lengths: int32 [2^16], the number of weights in the sequence of each code.
    steps: int64 [2^16, 16], for each code and each pair of weights, the code of
      the code's sequence followed by the pair or, where the dictionary lacks
      this longer sequence, the code of the pair alone. The pair (a, b) has the
      index 4 * (a & 3) + (b & 3); an index that no pair has leads to code 0.
    pairs: int64 [16], the code of the sequence that is each pair alone.
  """

  weights: np.ndarray
  lengths: np.ndarray
  steps: np.ndarray
  pairs: np.ndarray


@functools.cache
def dictionary(p0: float = P0) -> Dictionary:
  """The dictionary for a probability of zeros, made once (in 0.1 s).

  Args:
    p0: The probability that a weight is 0. Encoding and decoding take the
      paper's, `P0`.
  """
  zero, other = math.log(p0), math.log((1 - p0) / 2)
  classes = sorted(
    # Logarithms are rounded, so that those of equal probabilities are equal.
    (-round((weights - n) * zero + n * other, 9), weights, n)
    for weights in range(2, MOST_WEIGHTS + 1, 2)
    for n in range(weights + 1)
  )
  # A sequence's key is an integer whose bits are a 1 and then, for each weight,
  # its low 2 bits.
  keys = np.concatenate(
    [(1 << 2 * weights) + _sequences(weights, n) for _, weights, n in classes]
  )[:NUM_CODES]
  order = np.argsort(keys)

  def code_of(key, default):
    at = np.searchsorted(keys[order], key).clip(max=NUM_CODES - 1)
    return np.where(keys[order][at] == key, order[at], default)

  pairs = code_of(16 + np.arange(16), 0)
  steps = code_of(16 * keys[:, None] + np.arange(16), pairs)
  lengths = np.searchsorted(1 << 2 * np.arange(MOST_WEIGHTS + 1), keys, 'right')
  lengths = lengths.astype(np.int32) - 1
  bits = keys - (1 << 2 * lengths.astype(np.int64))
  bits = bits[:, None] >> 2 * np.arange(MOST_WEIGHTS - 1, -1, -1) & 3
  weights = ((bits & 1) - (bits & 2)).astype(np.int8)
  tables = Dictionary(weights, lengths, steps, pairs)
  for array in tables:
    array.flags.writeable = False
  return tables


@functools.cache
def _sequences(weights: int, nonzeros: int) -> np.ndarray:
  """The first 2^16 sequences of `weights` weights, `nonzeros` of them not 0.

  A sequence is an int64 of 2 bits a weight, the first weight highest: 0 is a
  weight of 0, and 1 and 3 are its two signs. They are ascending; there are
  fewer where fewer exist.
  """
  if not 0 <= nonzeros <= weights:
    return np.zeros(0, np.int64)
  if not weights:
    return np.zeros(1, np.int64)
  zeros = _sequences(weights - 1, nonzeros)
  others = _sequences(weights - 1, nonzeros - 1)
  first = 1 << 2 * (weights - 1)
  return np.concatenate([zeros, first + others, 3 * first + others])[:NUM_CODES]


class Codes(NamedTuple):
  """The codes of a ternary matrix, or of a matrix for each expert.

  The rows' codes follow each other without gaps. An expert with fewer codes
  than N, those of the expert with the most, has code 0 behind its last row.

  Attributes:
    codes: The codes. Each row decodes to a whole number of pairs, so that a row
      of an odd width ends in a weight 0 that is not one of its own.
    offsets: The index of the first code of each row, and the end of the last
      row. There are `rows` = R + 1 of them.
  """

  codes: UInt16[Array, '*E N']
  offsets: Int32[Array, '*E rows']


def encode(ternary: np.ndarray) -> Codes:
  """The codes of ternary matrices, as numpy arrays.

  Each code stands for the longest sequence of the dictionary that the weights
  of its row begin with, after those of the codes before it.

  Args:
    ternary: int8 [*E, R, M], weights -1, 0 and 1. A row is one output unit.

  Raises:
    ValueError: The weights are not int8, are others than -1, 0 and 1, have
      fewer than two dimensions, or are none.
  """
  ternary = np.asarray(ternary)
  if ternary.dtype != np.int8 or ternary.ndim < 2 or not ternary.size:
    raise InputError(
      f'{ternary.dtype}{list(ternary.shape)} must be int8 [..., rows, width], '
      'with at least one weight'
    )
  least, most = ternary.min(), ternary.max()
  if least < -1 or most > 1:
    weight = least if least < -1 else most
    raise InputError(f'weight {weight} is not one of -1, 0, 1')
  *expert_shape, R, M = ternary.shape
  matrices = ternary.reshape(-1, R, M)
  parsed = [
    [_parse(matrix[i : i + ROWS], dictionary()) for i in range(0, R, ROWS)]
    for matrix in matrices
  ]
  codes = [np.concatenate([codes for codes, _ in x]) for x in parsed]
  counts = [np.concatenate([counts for _, counts in x]) for x in parsed]
  padded = np.zeros((len(codes), max(x.size for x in codes)), np.uint16)
  for row, x in zip(padded, codes):
    row[: x.size] = x
  offsets = np.pad(np.cumsum(counts, axis=-1, dtype=np.int32), [(0, 0), (1, 0)])
  arrays: Any = (
    padded.reshape(*expert_shape, -1),
    offsets.reshape(*expert_shape, R + 1),
  )
  return Codes(*arrays)


def _parse(
  ternary: np.ndarray, table: Dictionary
) -> tuple[np.ndarray, np.ndarray]:
  """The codes of rows of weights [R, M], and the number of codes of each row.

  The codes, uint16, follow each other row by row; `table` is the dictionary.
  """
  R, M = ternary.shape
  bits = np.zeros((R, M + M % 2), np.int8)
  bits[:, :M] = ternary & 3
  pairs = np.ascontiguousarray((4 * bits[:, ::2] + bits[:, 1::2]).T)
  # For each pair and row, the code of the longest sequence that ends with the
  # pair, as the row is read pair by pair, [steps, R].
  codes = np.empty(pairs.shape, np.uint16)
  steps = table.steps.reshape(-1)
  prefixes, index = table.pairs[pairs[0]], np.empty(R, np.int64)
  codes[0] = prefixes
  for step in range(1, len(pairs)):
    np.multiply(prefixes, table.steps.shape[1], out=index)
    np.add(index, pairs[step], out=index)
    steps.take(index, out=prefixes, mode='clip')  # 'raise' would copy `out`
    codes[step] = prefixes
  # Where the code after a code is that of a pair alone, the pair could not
  # lengthen the sequence before it, which therefore has ended.
  ends = np.ones(codes.shape, bool)
  ends[:-1] = (table.lengths == 2)[codes[1:]]
  return codes.T[ends.T], ends.sum(0)


@functools.partial(jax.jit, static_argnames='width')
def decode(codes: Codes, width: int) -> Int8[Array, '*E R M']:
  """The ternary weights, -1, 0 or 1, of every row.

  All shapes are static: only the number of rows, the width and the length of
  the array of codes matter, whatever the codes are. Damaged codes give wrong
  weights and no error.

  Args:
    codes: The codes.
    width: The number M of weights of a row, which is one output unit.
  """
  if codes.offsets.ndim > 1:
    return jax.vmap(lambda expert_codes: decode(expert_codes, width))(codes)
  R, padded = codes.offsets.shape[0] - 1, width + width % 2
  table = dictionary()
  ends = jnp.cumsum(jnp.asarray(table.lengths)[codes.codes])
  # Each code adds a window of 28 weights, in which zeros stand before its own
  # weights. The output begins with 28 weights that belong to no row, so that
  # the windows of the first codes fit; they are cut off at the end.
  weights = jax.lax.scatter_add(
    jnp.zeros(MOST_WEIGHTS + R * padded, jnp.int8),
    ends[:, None],
    jnp.asarray(table.weights)[codes.codes],
    jax.lax.ScatterDimensionNumbers(
      update_window_dims=(1,),
      inserted_window_dims=(),
      scatter_dims_to_operand_dims=(0,),
    ),
    mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
  )
  return weights[MOST_WEIGHTS:].reshape(R, padded)[:, :width]
