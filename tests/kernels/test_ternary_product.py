"""The product with a coded ternary matrix against the dense product."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import codec
from moe_jax.kernels import ternary_product
from moe_jax.kernels.ternary import Codes
from moe_jax.kernels.ternary_product import ternary_matmul
from tests import ternary_reference as reference


def case(N, R, M, zeros, experts=(), dtype='float32'):
  """Rows, codes, low and high values, and the product of the dense matrix."""
  rng = np.random.default_rng(0)
  ternary = reference.random(zeros, *experts, R, M)
  x, low, high = (
    np.asarray(jnp.asarray(values, dtype))
    for values in (
      rng.normal(size=(*experts, N, M)),
      -rng.random((*experts, R)),
      rng.random((*experts, R)),
    )
  )
  w = np.where(ternary > 0, high[..., None], low[..., None])
  w = np.where(ternary == 0, 0, w).astype(float)
  y = np.einsum('...nm,...rm->...nr', x.astype(float), w)
  return (x, codec.encode(ternary), low, high), y


def close(y, expected):
  rtol = {'float32': 1e-5, 'bfloat16': 2.0**-8}[str(y.dtype)]
  y = np.asarray(y, float)
  np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
  ('shape', 'zeros', 'dtype'),
  [
    # There are five blocks of rows, the last one of a single row, and each has
    # several chunks of codes; the width is odd.
    ((3, 41, 77), 0.6, 'float32'),
    ((2, 1, 90), 0.885, 'bfloat16'),
    ((1, 20, 5), 1.0, 'float32'),
  ],
)
def test_blocks_are_decoded_and_multiplied(shape, zeros, dtype, monkeypatch):
  monkeypatch.setattr(ternary_product, 'BLOCK_WEIGHTS', 777)
  monkeypatch.setattr(ternary_product, 'CHUNK', 50)
  args, expected = case(*shape, zeros, dtype=dtype)
  y = jax.jit(functools.partial(ternary_matmul, backend='plain'))(*args)
  assert y.dtype == dtype
  close(y, expected)


def test_the_memory_of_a_product_is_that_of_a_block():
  x, low, high = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((2, 4096), (8192,), (8192,))
  )
  codes = Codes(
    jax.ShapeDtypeStruct((1_600_000,), jnp.uint16),
    jax.ShapeDtypeStruct((8193,), jnp.int32),
  )
  program = jax.jit(ternary_matmul).lower(x, codes, low, high).compile()
  temporary_bytes = program.memory_analysis().temp_size_in_bytes
  # A block is int8 and float32 for a moment; the table has 512 KiB.
  assert temporary_bytes < 16 * ternary_product.BLOCK_WEIGHTS < 8192 * 4096


def test_the_kernel_interpreted():
  # Each expert has two blocks of 128 rows, the second one not full; the weights
  # of one are codes of several groups, and those of the other are zeros.
  args, expected = case(5, 150, 256, 0.5, experts=(2,))
  x, _, low, high = args
  ternary = reference.random(0.5, 2, 150, 256)
  ternary[1] = 0
  codes = codec.encode(ternary)
  assert codes.codes.shape[1] > 2048 > codes.offsets[1, -1]
  expected[1] = 0
  for backend in ternary_product.BACKENDS:
    of_each = jax.vmap(functools.partial(ternary_matmul, backend=backend))
    close(jax.jit(of_each)(x, codes, low, high), expected)


def lowered(platform, width):
  args = case(2, 3, width, 0.885)[0]
  program = jax.jit(ternary_matmul).trace(*args)
  return program.lower(lowering_platforms=(platform,)).as_text()


def test_auto_is_the_kernel_on_tpus_alone():
  kernel = '@tpu_custom_call'
  assert lowered('tpu', 128).count(kernel) == 1
  assert kernel not in lowered('cpu', 128)
  assert kernel not in lowered('tpu', 130)  # no multiple of 128


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'backend': 'x'}, "unknown ternary_matmul backend 'x'"),
    ({'backend': 'pallas_tpu'}, 'width 9 must be a multiple of 128'),
    ({'low': jnp.zeros(4)}, 'high has shape (3,), and [R] is needed'),
    (
      {'codes': codec.encode(np.ones((2, 3, 9), np.int8))},
      'offsets [2, 4] must be [R + 1], where low and high have R=3',
    ),
    (
      {'codes': codec.encode(np.ones((2, 9), np.int8))},
      'offsets [3] must be [R + 1]',
    ),
  ],
)
def test_what_does_not_fit_is_refused(changed, message):
  names = 'x', 'codes', 'low', 'high'
  args = jax.tree.map(jnp.asarray, case(2, 3, 9, 0.885)[0])
  args = dict(zip(names, args)) | changed
  with pytest.raises(ValueError, match=re.escape(message)):
    ternary_matmul(**args)
