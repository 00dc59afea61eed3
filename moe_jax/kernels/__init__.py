"""Products of experts, of rows sorted by expert; kernels of few bits."""

from moe_jax.kernels.backends import BACKENDS
from moe_jax.kernels.grouped_feed_forward import grouped_ffn
from moe_jax.kernels.grouped_products import grouped_matmul

__all__ = ['BACKENDS', 'grouped_ffn', 'grouped_matmul']
