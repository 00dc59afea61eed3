"""Lines about a layer whose kernels are in codes."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import grids, quantize_kernels, stored
from moe_jax.compression.quantize_layers import Spot
from moe_jax.compression.quantize_report import report_of
from moe_jax.layers.kernel_format import KernelFormat


def test_kernels_without_a_factor_are_named():
  format = KernelFormat('int8')
  # Their products are zero, with tokens or without.
  rounded = jax.jit(lambda w: grids.nearest(w, stored.grid_of(w, format)))
  outcome = quantize_kernels.Outcome(
    rounded(jnp.ones((3, 4, 2))),
    *np.zeros((3, 3)),
    plain=np.array([False, True, True]),
  )
  dense = jax.tree.map(lambda x: x[1:2], outcome)
  outcomes = {
    Spot(('a',), 0, ('attention',), 'w_out'): dense,
    Spot(('b',), 0, ('moe', 'experts'), 'w_in'): outcome,
    Spot(('c',), 0, ('moe', 'experts'), 'w_out'): outcome,
  }
  report = report_of(outcomes, format, by_data=True, without_tokens=[2])
  assert report.text().endswith(
    '; H = I for experts [2] (no tokens)'
    '; H = I for attention/w_out, expert 1 (no factor)'
  )
  assert 'H =' not in report_of(outcomes, format, by_data=False).text()
