"""Ternary matrices encoded as QMoE does: the greedy parse of each row.

The paper is https://arxiv.org/abs/2310.16795, section 4; `kernels/ternary.py`
has its dictionary, and decodes.
"""

from typing import Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.kernels.ternary import Codes, Dictionary, dictionary

# The number of rows that step through the dictionary together. The entries
# that so many rows need stay in the cache.
ROWS = 4096


def encode(ternary: np.ndarray) -> Codes:
  """The codes of ternary matrices, as numpy arrays.

  Each code is the longest sequence of the dictionary that the rest of its row
  begins with.

  Args:
    ternary: int8 [*E, R, M], weights -1, 0 and 1. A row is one output unit.

  Raises:
    ValueError: The weights are not int8, are others than -1, 0 and 1, or are
      no matrix.
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
  expert_shape, (R, M) = ternary.shape[:-2], ternary.shape[-2:]
  encoded = [_encode(matrix) for matrix in ternary.reshape(-1, R, M)]
  longest = max(codes.size for codes, _ in encoded)
  padded = [np.pad(codes, (0, longest - codes.size)) for codes, _ in encoded]
  offsets = np.stack([row_offsets for _, row_offsets in encoded])
  arrays: Any = (
    np.stack(padded).reshape(*expert_shape, longest),
    offsets.reshape(*expert_shape, R + 1),
  )
  return Codes(*arrays)


def _encode(ternary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Codes uint16 [N] and offsets int32 [R + 1] of one matrix [R, M]."""
  R = ternary.shape[0]
  blocks = [
    _parse(ternary[start : start + ROWS], dictionary())
    for start in range(0, R, ROWS)
  ]
  counts = np.concatenate([counts for _, counts in blocks])
  offsets = np.zeros(R + 1, np.int32)
  np.cumsum(counts, out=offsets[1:])
  return np.concatenate([codes for codes, _ in blocks]), offsets


def _parse(
  ternary: np.ndarray, table: Dictionary
) -> tuple[np.ndarray, np.ndarray]:
  """The codes of some rows, and the number of codes of each row."""
  R, M = ternary.shape
  bits = np.zeros((R, M + M % 2), np.int8)
  bits[:, :M] = ternary & 3
  pairs = np.ascontiguousarray((4 * bits[:, ::2] + bits[:, 1::2]).T)
  # The longest sequence that each row has read so far, [steps, R].
  codes = np.empty(pairs.shape, np.uint16)
  steps = table.steps.reshape(-1)
  prefixes, index = table.pairs[pairs[0]], np.empty(R, np.int64)
  codes[0] = prefixes
  for step in range(1, len(pairs)):
    np.multiply(prefixes, table.steps.shape[1], out=index)
    np.add(index, pairs[step], out=index)
    steps.take(index, out=prefixes, mode='clip')  # 'raise' would copy `out`
    codes[step] = prefixes
  # A sequence of one pair begins a new code.
  ends = np.ones(codes.shape, bool)
  ends[:-1] = (table.lengths == 2)[codes[1:]]
  return codes.T[ends.T], ends.sum(0)
