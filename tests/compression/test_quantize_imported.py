"""Checkpoints of transformers are quantised, generated from and exported."""

import jax
import numpy as np
import pytest

from moe_jax import cli, evaluation, generation, interop, run_config
from moe_jax.compression import quantize, whole_run
from moe_jax.generation import trained_run
from moe_jax.interop import import_run
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
  path = str(folders.write_config(tmp_path / 'configs'))
  options = run_config.read(cli.load_config(path))
  import_run.import_run(hf, run, options, devices=jax.devices()[:1])
  lines = []
  numbers = quantize.quantize(
    run,
    new,
    KernelFormat('int4'),
    num_batches=1,
    message=lines.append,
  )
  assert numbers['bytes'] < numbers['bytes before']
  assert 0 < numbers['gptq error'] < numbers['rtn error']
  quantized = generation.load(new)
  assert len(lines) >= len(quantized.model.stacks.sparse_layers)
  options, params = code_trees.decoded(
    quantized.options.model, quantized.variables['params']
  )
  variables = {'params': params}
  ids = trained_run.special_ids(quantized.model, quantized.tokenizer)
  texts = [
    generation.generate(
      model, model_variables, [[5, 6, 7]], num_tokens=5, **ids
    )
    for model, model_variables in (
      (quantized.model, quantized.variables),
      (options.build(), variables),
    )
  ]
  np.testing.assert_array_equal(*(text.tokens for text in texts))
  loss = evaluation.evaluate(new, evaluation.LossEvaluation(num_batches=1))
  assert np.isfinite(loss['loss'])
  # transformers reads the numbers that codes stand for.
  assert 'written as numbers' in '\n'.join(export_run(new, tmp_path / 'out'))
  loaded = interop.load(tmp_path / 'out')
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables['params'], params
  )
  assert whole_run.read(new).step == 0
