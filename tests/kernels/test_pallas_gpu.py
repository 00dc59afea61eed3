"""Triton kernels lowered for a GPU, which no test has.

Interpreted they are compared to loops in `test_backends.py`.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir

from moe_jax.kernels import grouped_matmul, pallas_gpu

# Shapes are those of Mixtral 8x7B at 16,384 tokens, and others of which no tile
# is a divisor.
MIXTRAL = 32768, 8, 4096, 14336
RAGGED = 300, 5, 150, 200


def gradients(backend='pallas_gpu'):
  """A function (x, w, group_sizes, dy) -> y, dx, dw."""

  def run(x, w, group_sizes, dy):
    product = functools.partial(
      grouped_matmul, group_sizes=group_sizes, backend=backend
    )
    y, pull = jax.vjp(product, x, w)
    return y, *pull(dy)

  return run


row_blocks = jax.jit(pallas_gpu.row_blocks, static_argnums=(1, 2, 3))


def blocks(group_sizes, num_blocks):
  """Blocks (expert, first row, end of the expert's rows) of four of 11 rows."""
  sizes = np.array(group_sizes, np.int32)
  return list(zip(*np.array(row_blocks(sizes, 11, 4, num_blocks))))


def test_blocks_of_rows_by_hand():
  # Expert 0 has three rows, expert 1 none, and expert 2 six, which are two
  # blocks. The last two rows belong to no group and count as expert 3's, and
  # the last two blocks have no row.
  row_blocks = [(0, 0, 3), (2, 3, 9), (2, 7, 9), (3, 9, 11)]
  assert blocks((3, 0, 6), 6) == [*row_blocks, (3, 13, 11), (3, 17, 11)]
  # Wrong group sizes must not lead to a write out of bounds.
  assert blocks((3, 99, 6), 4) == [
    (0, 0, 3),
    (1, 3, 11),
    (1, 7, 11),
    (3, 11, 11),
  ]


def test_a_tile_fits_the_shared_memory_of_any_gpu_since_ampere():
  # Of few rows and narrow kernels the tiles are smaller.
  assert pallas_gpu.tiles(60, 150, 200, 'float32') == (64, 32, 128)
  assert pallas_gpu.tiles(2, 64, 16, 'bfloat16') == (16, 64, 16)
  for dtype in ('bfloat16', 'float32'):
    rows, contract, cols = pallas_gpu.tiles(4096, 4096, 14336, dtype)
    stage = (rows + cols) * contract * jnp.dtype(dtype).itemsize
    assert (rows, cols, 3 * stage) == (128, 128, 96 * 1024)


@functools.cache
def lowered(shape, dtype, backend):
  """Value and gradients lowered for CUDA: the text and the kernels."""
  N, E, M, F = shape
  x, w, dy = (
    jax.ShapeDtypeStruct(size, dtype) for size in ((N, M), (E, M, F), (N, F))
  )
  group_sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
  program = jax.jit(gradients(backend)).trace(x, w, group_sizes, dy)
  program = program.lower(lowering_platforms=('cuda',))
  kernels = _kernels(program.compiler_ir('stablehlo').operation)
  # The text is without the kernels' bytes, which could contain any word.
  return re.sub(r'\bir = "[^"]*"', '', program.as_text()), list(kernels)


def _kernels(op):
  """Yields the name and parsed Triton module of each kernel that `op` calls."""
  for region in op.regions:
    for inner in (inner for block in region for inner in block):
      inner = inner.operation
      if 'triton' in str(inner.attributes.get('call_target_name', '')):
        yield _parsed(inner.attributes)
      yield from _kernels(inner)


def _parsed(attributes):
  config = ir.DictAttr(attributes['mhlo.backend_config'])
  # jaxlib can lack this in versions that `for_cuda` lets pass.
  from jaxlib.triton import dialect as triton  # noqa: TID251

  # Parsing verifies the module, and lowering does not.
  with ir.Context() as context:
    triton.register_dialect(context)
    module = ir.Module.parse(ir.StringAttr(config['ir']).value_bytes)
  return ir.StringAttr(config['name']).value, str(module)


for_cuda = pytest.mark.skipif(
  jax.__version_info__ > (0, 10, 2),
  reason='a newer jaxlib lowers Triton kernels only with its CUDA plug-in',
)


@for_cuda
@pytest.mark.parametrize('shape', [MIXTRAL, RAGGED])
def test_lowered_for_cuda_it_is_three_kernels_and_no_dense_product(shape):
  N, E, M, F = shape
  text, kernels = lowered(shape, 'float32', 'auto')
  names = ['_matmul_kernel', '_matmul_kernel', '_outer_kernel']
  assert [name for name, _ in kernels] == names
  assert text.count('@__gpu$xla.gpu.triton(') == 3
  assert 'dot' not in text
  values = re.findall(r'tensor<((?:\d+x)+)', text)
  sizes = {math.prod(map(int, value[:-1].split('x'))) for value in values}
  # No array is larger than the operands and the results.
  assert max(sizes) == max(N * M, N * F, E * M * F) < N * E * F


@for_cuda
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_the_triton_programs(dtype):
  short = {'bfloat16': 'bf16', 'float32': 'f32'}[dtype]
  step = {'bfloat16': 64, 'float32': 32}[dtype]
  tile = f'tensor<128x{step}x{short}> * tensor<{step}x128x{short}>'
  _, kernels = lowered(MIXTRAL, dtype, 'pallas_gpu')
  for name, module in kernels:
    # Each kernel has one product in one loop, with inputs in their own type and
    # sums in float32.
    assert module.count('scf.for') == module.count('tt.dot') == 1
    assert f'{tile} -> tensor<128x128xf32>' in module
    assert module.count('tt.store') == 1
    # Only rows are masked, since no tile crosses another edge.
    loop = module[module.index('scf.for') : module.index('scf.yield')]
    loads = re.findall(r'tt\.load ([^:]*):', loop)
    masked = [load.count(',') == 2 for load in loads]
    assert masked == {'_matmul_kernel': [True, False]}.get(name, [True, True])
  trans = [module.count('tt.trans') for _, module in kernels]
  assert trans == [0, 1, 1]


@for_cuda
def test_rows_and_edges_are_masked_in_what_is_written():
  # The interpreter discards a write out of bounds; on a GPU it changes the next
  # row.
  for name, module in lowered(RAGGED, 'float32', 'pallas_gpu')[1]:
    (mask,) = re.findall(r'tt\.store %\w+, %\w+, (%\w+) :', module)
    masks = re.search(rf'{mask} = arith\.andi (%\w+), (%\w+)', module).groups()
    mask_shapes = [
      re.search(rf'{part} = tt\.broadcast .*: tensor<(\w+)xi1>', module)[1]
      for part in masks
    ]
    rows = {'_matmul_kernel': '64x1', '_outer_kernel': '128x1'}[name]
    assert mask_shapes == [rows, '1x128']


@for_cuda
def test_float32_products_have_the_precision_that_was_asked_for():
  # The text names the precision only where it is not exact.
  for _, module in lowered(RAGGED, 'float32', 'pallas_gpu')[1]:
    assert 'inputPrecision = tf32' in module
  with jax.default_matmul_precision('highest'):
    _, kernels = lowered.__wrapped__(RAGGED, 'float32', 'pallas_gpu')
  for _, module in kernels:
    assert 'tt.dot' in module and 'inputPrecision' not in module


@for_cuda
def test_offsets_past_four_gibibytes_are_64_bit():
  # With 2^18 rows of 14336 the output alone has 3.8e9 values.
  shape = 1 << 18, *MIXTRAL[1:]
  _, ((_, forward), *_) = lowered(shape, 'bfloat16', 'pallas_gpu')
  (stored,) = re.findall(r'tt\.store (%\w+),', forward)
  address = re.search(rf'{stored} = tt\.addptr .*', forward)[0]
  assert address.endswith('tensor<128x128xi64>')
