"""Sixteenths of a share of rows that blocks of experts' rows have in tests.

A layer's program grows with their number, and takes as much longer to compile.
"""

from moe_jax.kernels import blocks

ALL = blocks.SIXTEENTHS
FEW = (8, 20)
