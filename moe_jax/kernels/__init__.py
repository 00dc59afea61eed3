"""Products of experts: of rows sorted by expert, and with coded kernels."""

from moe_jax.kernels.backends import BACKENDS
from moe_jax.kernels.grouped_feed_forward import grouped_ffn
from moe_jax.kernels.grouped_products import grouped_matmul
from moe_jax.kernels.ternary_product import ternary_matmul

__all__ = ['BACKENDS', 'grouped_ffn', 'grouped_matmul', 'ternary_matmul']
