"""Checkpoints of transformers are quantised, generated from and exported."""

import jax
import numpy as np
import pytest

from moe_jax import interop
from moe_jax.compression import quantize, whole_run
from moe_jax.interop.export_run import export_run
from moe_jax.kernels.kernel_format import KernelFormat
from moe_jax.models import code_trees
from tests.interop import folders

pytest.importorskip('torch')
pytest.importorskip('transformers')


@pytest.mark.slow
def test_an_imported_checkpoint(tmp_path):
  hf, run, new = (tmp_path / name for name in ('hf', 'run', 'new'))
  sizes = ('num_layers', 'num_sparse_encoder_layers', 'num_decoder_layers')
  folders.write(hf, 'switch_transformers', **dict.fromkeys(sizes, 1))
  folders.import_run(hf, run)
  lines = []
  options = dict(num_batches=1, message=lines.append)
  numbers = quantize.quantize(run, new, KernelFormat('int4'), **options)
  assert numbers['bytes'] < numbers['bytes before']
  assert 0 < numbers['gptq error'] < numbers['rtn error']
  quantized = whole_run.read(new)
  assert len(lines) >= len(quantized.model.stacks.sparse_layers)
  _, params = code_trees.decoded(
    quantized.options.model, quantized.variables['params']
  )
  # transformers reads the numbers that codes stand for.
  export_run(new, tmp_path / 'out')
  loaded = interop.load(tmp_path / 'out')
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables['params'], params
  )
