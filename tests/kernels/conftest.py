"""Kernels are tested with all sizes of blocks."""

import pytest

from moe_jax.kernels import blocks
from tests import block_sizes


@pytest.fixture(autouse=True)
def _all_sizes(monkeypatch):
  monkeypatch.setattr(blocks, 'SIXTEENTHS', block_sizes.ALL)
