"""Lines about a layer whose kernels are in codes."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import grids, quantize_kernels
from moe_jax.compression.quantize_layers import Spot
from moe_jax.compression.quantize_report import report_of
from moe_jax.layers.kernel_format import KernelFormat


def test_kernels_without_a_factor_are_named():
  format = KernelFormat('int8')
  # Their products are zero, with tokens or without.
  rounded = jax.jit(lambda w: grids.nearest(w, grids.of_format(w, format)))
  outcome = quantize_kernels.Outcome(
    rounded(jnp.ones((3, 4, 2))),
    *np.zeros((3, 3)),
    plain=np.array([False, True, True]),
  )
  outcomes = {
    Spot(('experts', 'w_in'), 0): outcome,
    Spot(('experts', 'w_out'), 0): outcome,
  }
  report = report_of(outcomes, format, by_data=True, without_tokens=[2])
  assert report.text().endswith(
    '; H = I for experts [2] (no tokens); H = I for experts [1] (no factor)'
  )
  assert 'H =' not in report_of(outcomes, format, by_data=False).text()
