"""Products of rows sorted by expert, and kernels in codes of few bits."""

from moe_jax.kernels.grouped_products import (
  BACKENDS,
  grouped_ffn,
  grouped_matmul,
)

__all__ = ['BACKENDS', 'grouped_ffn', 'grouped_matmul']
