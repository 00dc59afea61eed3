"""Bits a ternary weight: predicted, measured, and printed."""

import itertools
import math

import numpy as np
import pytest

from moe_jax.compression import rates
from moe_jax.kernels import ternary


@pytest.mark.parametrize(('width', 'zeros'), [(7, 0.3), (4, 1.0)])
def test_the_prediction_is_the_mean_over_all_rows(width, zeros):
  rows = np.array([*itertools.product((0, 1, -1), repeat=width)], np.int8)
  nonzeros = (rows != 0).sum(1)
  chance = zeros ** (width - nonzeros) * ((1 - zeros) / 2) ** nonzeros
  counts = np.diff(ternary.encode(rows).offsets)
  assert math.isclose(
    rates.predicted(width, zeros), 16 * (chance @ counts) / width
  )


@pytest.mark.parametrize(('zeros', 'bits'), [(0.80, 1.12), (0.885, 0.73)])
def test_rates_of_rows_as_wide_as_the_paper_s(zeros, bits):
  measured = rates.measured(6144, zeros)
  assert measured.codes == pytest.approx(bits, rel=0.02)
  assert measured.codes == pytest.approx(rates.predicted(6144, zeros), rel=0.01)
  assert measured.metadata == pytest.approx(64 / 6144, rel=0.01)
