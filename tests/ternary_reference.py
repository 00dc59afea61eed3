"""QMoE's codec by its definition: a heap, and the longest match.

The definition is section 4 of https://arxiv.org/abs/2310.16795.
"""

import functools
import heapq
import itertools
import math

import numpy as np

NUM_CODES, MOST_PAIRS = 1 << 16, 14
# Equally probable sequences are ordered by these digits of their weights.
DIGITS = {0: 0, 1: 1, 2: -1}


@functools.cache
def dictionary(p0, size=NUM_CODES):
  """The `size` most probable sequences of weights, as tuples."""
  zero, other = math.log(p0), math.log((1 - p0) / 2)
  pairs = [
    (pair, sum(digit > 0 for digit in pair))
    for pair in itertools.product(DIGITS, DIGITS)
  ]
  # Negative log-probability, length, number of non-zeros, digits.
  heap, sequences = [(0.0, 0, 0, ())], []
  while len(sequences) < size:
    _, length, nonzeros, digits = heapq.heappop(heap)
    if digits:
      sequences.append(tuple(DIGITS[digit] for digit in digits))
    if length == 2 * MOST_PAIRS:
      continue
    for pair, pair_nonzeros in pairs:
      n = nonzeros + pair_nonzeros
      logit = zero * (length + 2 - n) + other * n
      entry = -round(logit, 9), length + 2, n, digits + pair
      heapq.heappush(heap, entry)
  return sequences


def greedy(row, code_of):
  """The codes of one row, each of the longest sequence that fits."""
  codes = []
  row = tuple(int(weight) for weight in row) + (0,) * (len(row) % 2)
  while row:
    lengths = range(2, min(len(row), 2 * MOST_PAIRS) + 1, 2)
    length = max(n for n in lengths if row[:n] in code_of)
    codes.append(code_of[row[:length]])
    row = row[length:]
  return codes


def random(zeros, *shape, seed=0):
  """Independent int8 weights; a share `zeros` of them is 0."""
  half = (1 - zeros) / 2
  rng = np.random.default_rng(seed)
  values = np.array([0, 1, -1], np.int8)
  return rng.choice(values, size=shape, p=[zeros, half, half])
