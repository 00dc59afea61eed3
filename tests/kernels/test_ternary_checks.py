"""Ternary codes that are damaged are refused."""

import re

import numpy as np
import pytest

from moe_jax.kernels import ternary_checks
from moe_jax.kernels.ternary import Codes

# Codes of rows of 31 weights, of which 28 and 4 (one is not theirs) are zeros.
GOOD = Codes(
  np.array([25, 1, 25, 1, 0], np.uint16), np.array([0, 2, 4], np.int32)
)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    ({'codes': GOOD.codes.astype(np.int32)}, 'codes of type int32 must be'),
    ({'offsets': GOOD.offsets.astype(float)}, 'offsets of type float64 must'),
    ({'codes': GOOD.codes[None]}, 'codes [1, 5] and offsets [3] must be'),
    ({'offsets': GOOD.offsets[:1]}, 'at least one row'),
    ({'offsets': GOOD.offsets + 1}, 'offsets begin with 1 and not with 0'),
    (
      {'offsets': np.array([0, 4, 2], np.int32)},
      'row 1 begins at code 4 and ends at 2: each row must have a code',
    ),
    ({'offsets': np.array([0, 2, 6], np.int32)}, 'row 1 ends at code 6 of 5'),
    (
      {'codes': np.array([25, 1, 25, 1, 7], np.uint16)},
      'code 4 is 7: past the last row, which ends at 4, codes must be 0',
    ),
    (
      {'codes': np.array([25, 1, 24, 1, 0], np.uint16)},
      'row 1 decodes to 8 weights; width=31 needs 32',
    ),
    (
      {'offsets': np.array([0, 1, 4], np.int32)},
      'row 0 decodes to 28 weights; width=31 needs 32',
    ),
    (
      {'codes': np.array([25, 17, 25, 1, 0], np.uint16)},
      'row 0 has a weight behind its width=31 that is not 0',
    ),
  ],
)
def test_damaged_codes_are_refused(damage, message):
  ternary_checks.check(GOOD, 31)
  with pytest.raises(ValueError, match=re.escape(message)):
    ternary_checks.check(GOOD._replace(**damage), 31)


def test_the_damaged_expert_is_named():
  codes = Codes(*(np.stack([array] * 3) for array in GOOD))
  ternary_checks.check(codes, 31)
  codes.codes[2, 1] = 2
  with pytest.raises(ValueError, match=r'row 0 of expert \[2\] decodes to 34'):
    ternary_checks.check(codes, 31)
