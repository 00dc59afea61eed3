"""The dictionary of QMoE: sequences of ternary weights, one a 16-bit code.

A weight is 0 with probability p0, and 1 or -1 with (1 - p0) / 2 each. The
dictionary has the 2^16 most probable sequences of whole pairs of weights, 14
pairs at most (https://arxiv.org/abs/2310.16795, section 4). A sequence is less
probable than any that it begins with, so the dictionary has all of those too,
and the greedy parse of a row never fails.

The paper pops the sequences from a heap. Here they are counted instead: all
sequences of one length and one number of non-zeros are equally probable, which
makes them a class, and the classes in order are the dictionary. A code is then
the number of its class's first code plus a rank among that class, and no table
is needed to decode it. Not here: encoding (`compression/codec.py`) and decoding
(`ternary.py`).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_jax.errors import InputError

NUM_CODES = 1 << 16
MOST_PAIRS = 14
MOST_WEIGHTS = 2 * MOST_PAIRS
# The share of zeros that the paper's table was made for.
P0 = 0.885
# The weights of one word of an entry, 2 bits each.
WORD_WEIGHTS = 14


class SequenceClass(NamedTuple):
  """Sequences of one length and number of non-zeros, in lexical order.

  The order of the weights is 0, 1, -1.

  Attributes:
    first: The code of the first sequence.
    weights: The number of weights of a sequence, twice its pairs.
    nonzeros: The number of weights that are not zero.
  """

  first: int
  weights: int
  nonzeros: int


class Dictionary(NamedTuple):
  """The dictionary as arrays; they must not be written to.

  Attributes:
    words: uint32 [2, 2^16], the low 2 bits of each weight of a code, from the
      last weight of the sequence on: weight d from the end stands in word
      d // 14 at bit 2 * (d % 14), and bits past the first weight are 0.
    lengths: int32 [2^16], the number of weights of each code.
    steps: int64 [2^16, 16], the code of a code's sequence and one more pair.
      Where the dictionary lacks it, the code of the pair alone. The pair
      (a, b) is number 4 * (a & 3) + (b & 3); numbers of no pair have code 0.
    pairs: int64 [16], the code of each pair alone.
  """

  words: np.ndarray
  lengths: np.ndarray
  steps: np.ndarray
  pairs: np.ndarray


def num_sequences(weights: int, nonzeros: int) -> int:
  """The number of sequences of that length with that many non-zeros."""
  return math.comb(weights, nonzeros) << nonzeros


@functools.cache
def classes(p0: float = P0) -> tuple[SequenceClass, ...]:
  """The classes in the order of their codes, the last one cut at 2^16 codes.

  Classes of equal probability are ordered by length, then by non-zeros.

  Raises:
    ValueError: p0 is not above 0 and below 1, or is so small that the
      dictionary lacks the pair of two zeros.
  """
  if not 0 < p0 < 1:
    raise InputError(f'p0={p0} must be above 0 and below 1')
  zero, other = math.log(p0), math.log((1 - p0) / 2)
  ordered = sorted(
    # Rounded, so that equal probabilities are equal in floating point too.
    (-round((weights - n) * zero + n * other, 9), weights, n)
    for weights in range(2, MOST_WEIGHTS + 1, 2)
    for n in range(weights + 1)
  )
  chosen, first = [], 0
  for _, weights, nonzeros in ordered:
    if first >= NUM_CODES:
      break
    chosen.append(SequenceClass(first, weights, nonzeros))
    first += num_sequences(weights, nonzeros)
  complete = {c[1:] for c in chosen if first <= NUM_CODES or c != chosen[-1]}
  if not {(2, 0), (2, 1), (2, 2)} <= complete:
    raise InputError(
      f'p0={p0} is too small: the dictionary lacks a pair of weights'
    )
  return tuple(chosen)


def unrank(codes, p0: float, where: Callable):
  """The words and lengths of codes, from the classes alone.

  Args:
    codes: int32 of any shape, numpy's or JAX's.
    p0: The probability of a zero.
    where: The `where` of the library of `codes`.

  Returns:
    The two words and the length of each code, int32, as in `Dictionary`.
  """
  table = classes(p0)
  rank, length, nonzeros_left = (codes * 0 for _ in range(3))
  for first, weights, nonzeros in table:
    inside = codes >= first
    rank = where(inside, codes - first, rank)
    length = where(inside, weights, length)
    nonzeros_left = where(inside, nonzeros, nonzeros_left)
  most = max(c.nonzeros for c in table)
  words = [codes * 0, codes * 0]
  for after in reversed(range(MOST_WEIGHTS)):  # the number of weights behind
    # The sequences that agree so far come in order: first those with a zero
    # here, then those with 1. The weights behind have `nonzeros_left`
    # non-zeros, or one fewer.
    zeros, ones = codes * 0, codes * 0
    for n in range(most + 1):
      zeros = where(nonzeros_left == n, _capped(after, n), zeros)
      if n:
        ones = where(nonzeros_left == n, _capped(after, n - 1), ones)
    nonzero = (length > after) & (rank >= zeros)
    rank = where(nonzero, rank - zeros, rank)
    negative = nonzero & (rank >= ones)
    rank = where(negative, rank - ones, rank)
    nonzeros_left = where(nonzero, nonzeros_left - 1, nonzeros_left)
    bits = where(negative, 3, where(nonzero, 1, 0))
    word, position = divmod(after, WORD_WEIGHTS)
    words[word] = words[word] + bits * (1 << 2 * position)
  return words[0], words[1], length


def _capped(weights: int, nonzeros: int) -> int:
  """The number of sequences, or one above any rank: either fits into int32."""
  return min(num_sequences(weights, nonzeros), NUM_CODES)


@functools.cache
def dictionary(p0: float = P0) -> Dictionary:
  """The dictionary of a probability of zeros, made once (in 0.1 s).

  Raises:
    ValueError: See `classes`.
  """
  codes = np.arange(NUM_CODES, dtype=np.int64)
  *words, lengths = unrank(codes, p0, np.where)
  # The weights of a sequence, 2 bits each, behind a leading 1.
  keys = (words[1] << 2 * WORD_WEIGHTS) + words[0] + (1 << 2 * lengths)
  order = np.argsort(keys)

  def code_of(key, default):
    at = np.searchsorted(keys[order], key).clip(max=NUM_CODES - 1)
    return np.where(keys[order][at] == key, order[at], default)

  pairs = code_of(16 + np.arange(16), 0)
  steps = code_of(16 * keys[:, None] + np.arange(16), pairs)
  tables = Dictionary(
    np.stack(words).astype(np.uint32), lengths.astype(np.int32), steps, pairs
  )
  for array in tables:
    array.flags.writeable = False
  return tables
