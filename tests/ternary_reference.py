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
  heap, popped = [(0.0, 0, 0, ())], []
  while len(popped) < size:
    _, length, nonzeros, digits = heapq.heappop(heap)
    if digits:
      popped.append(tuple(DIGITS[digit] for digit in digits))
    if length == 2 * MOST_PAIRS:
      continue
    for pair, more in pairs:
      n = nonzeros + more
      logit = zero * (length + 2 - n) + other * n
      item = -round(logit, 9), length + 2, n, digits + pair
      heapq.heappush(heap, item)
  return popped


def greedy(row, numbered):
  """The codes of one row, each the longest that fits; `numbered` has all."""
  codes = []
  row = tuple(int(weight) for weight in row) + (0,) * (len(row) % 2)
  while row:
    lengths = range(2, min(len(row), 2 * MOST_PAIRS) + 1, 2)
    length = max(n for n in lengths if row[:n] in numbered)
    codes.append(numbered[row[:length]])
    row = row[length:]
  return codes


def random(zeros, *shape, seed=0):
  """Independent weights of that share of zeros, int8."""
  half = (1 - zeros) / 2
  rng = np.random.default_rng(seed)
  values = np.array([0, 1, -1], np.int8)
  return rng.choice(values, size=shape, p=[zeros, half, half])
