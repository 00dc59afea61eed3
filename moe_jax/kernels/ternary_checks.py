"""Checks of ternary codes that were read from somewhere, before they are used.

Not here: what codes are (`ternary.py`).
"""

import numpy as np

from moe_jax.errors import InputError
from moe_jax.kernels.ternary import Codes
from moe_jax.kernels.ternary_dictionary import P0, dictionary


def check(codes: Codes, width: int, p0: float = P0) -> None:
  """Checks codes that were read from somewhere; one pass on the host.

  Args:
    codes: The codes.
    width: The number of weights that each row must have.
    p0: The probability of a zero of which their dictionary was made.

  Raises:
    ValueError: The arrays have other types or shapes than `Codes`, offsets do
      not begin with 0 or descend or reach past the codes, or a row decodes to
      another number of weights.
  """
  values, offsets = (np.asarray(array) for array in codes)
  for name, array, dtype in (
    ('codes', values, np.uint16),
    ('offsets', offsets, np.int32),
  ):
    if array.dtype != dtype:
      raise InputError(
        f'{name} of type {array.dtype} must be {np.dtype(dtype)}'
      )
  if (
    not values.ndim
    or values.shape[:-1] != offsets.shape[:-1]
    or offsets.shape[-1] < 2
  ):
    raise InputError(
      f'codes {list(values.shape)} and offsets {list(offsets.shape)} must be '
      '[..., N] and [..., R + 1], with equal leading sizes and at least one row'
    )
  for expert in np.ndindex(values.shape[:-1]):
    where = f' of expert {list(expert)}' if expert else ''
    _check_one(values[expert], offsets[expert], width, p0, where)


def _check_one(values, offsets, width, p0, where) -> None:
  if offsets[0] != 0:
    raise InputError(f'offsets{where} begin with {offsets[0]} and not with 0')
  counts = np.diff(offsets.astype(np.int64))
  if (row := _first(counts < 1)) is not None:
    raise InputError(
      f'row {row}{where} begins at code {offsets[row]} and ends at '
      f'{offsets[row + 1]}: each row must have a code'
    )
  if (row := _first(offsets[1:] > values.size)) is not None:
    raise InputError(
      f'row {row}{where} ends at code {offsets[row + 1]} of {values.size}'
    )
  if (at := _first(values[offsets[-1] :] != 0)) is not None:
    at += offsets[-1]
    raise InputError(
      f'code {at}{where} is {values[at]}: past the last row, which ends at '
      f'{offsets[-1]}, codes must be 0'
    )
  table = dictionary(p0)
  lengths = table.lengths[values[: offsets[-1]]]
  widths = np.add.reduceat(lengths, offsets[:-1])
  padded = width + width % 2
  if (row := _first(widths != padded)) is not None:
    raise InputError(
      f'row {row}{where} decodes to {widths[row]} weights; width={width} needs '
      f'{padded}'
    )
  last = table.words[0][values[offsets[1:] - 1]] & 3
  if width % 2 and (row := _first(last != 0)) is not None:
    raise InputError(
      f'row {row}{where} has a weight behind its width={width} that is not 0'
    )


def _first(mask: np.ndarray) -> int | None:
  return int(mask.argmax()) if mask.any() else None
