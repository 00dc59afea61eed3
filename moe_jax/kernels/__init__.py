"""Products of rows sorted by expert, and kernels quantised to few bits."""

from moe_jax.kernels.grouped_products import (
  BACKENDS,
  grouped_ffn,
  grouped_matmul,
)

__all__ = ['BACKENDS', 'grouped_ffn', 'grouped_matmul']
