"""Tensors in MXFP4 against transformers' decoding, and damaged ones."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax import interop
from moe_jax.data.plain_files import read_json
from moe_jax.interop.gpt_oss import Mxfp4Files, decode
from tests.interop import folders, oracle

torch = pytest.importorskip('torch')
files = pytest.importorskip('safetensors.torch')
hf_mxfp4 = pytest.importorskip('transformers.integrations.mxfp4')

E, N, C = 3, 5, 2  # experts, outputs, blocks of 32 inputs


def packed(rng, low=100, high=140):
  blocks = rng.integers(0, 256, (E, N, C, 16), dtype=np.uint8)
  return blocks, rng.integers(low, high, (E, N, C), dtype=np.uint8)


def test_a_told_block():
  blocks = np.zeros((1, 16), np.uint8)
  blocks[0, :3] = [0x21, 0xF7, 0x0A]  # 0.5 and 1, 6 and -6, -1 and 0
  values = decode(blocks, np.array([128], np.uint8)).astype(np.float32)
  assert values.shape == (32,)
  np.testing.assert_array_equal(values[:6], [1, 2, 12, -12, -2, 0])
  assert not values[6:].any()


def test_a_slice_is_that_of_the_whole(tmp_path):
  blocks, scales = packed(np.random.default_rng(1))
  plain = np.ones((2, 3), np.float32)
  tensors = {'w_blocks': blocks, 'w_scales': scales, 'plain': plain}
  save_file(tensors, tmp_path / 'model.safetensors')
  mxfp4 = Mxfp4Files(tmp_path)
  assert mxfp4.specs['w'].shape == (E, 32 * C, N)
  assert mxfp4.specs.keys() == {'w', 'plain'}
  assert mxfp4.largest == 2 * E * 32 * C * N
  whole = mxfp4.read('w')
  for index in (
    (slice(1, 3), slice(30, 35), slice(2, 4)),
    (slice(0, 1), slice(32, 64), slice(0, N)),
    (slice(None), slice(5, 6), slice(None)),
  ):
    np.testing.assert_array_equal(mxfp4.read('w', index), whole[index])
  np.testing.assert_array_equal(mxfp4.read('plain'), plain)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop('w_scales'), 'w_blocks has no w_scales'),
    (
      lambda t: t.update(w_scales=t['w_scales'][:, 1:].copy()),
      r'scales \[3, 4, 2\]',
    ),
    (lambda t: t.update(w=t['w_scales']), 'with and without blocks'),
  ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
  blocks, scales = packed(np.random.default_rng(2))
  tensors = {'w_blocks': blocks, 'w_scales': scales}
  change(tensors)
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=message):
    Mxfp4Files(tmp_path)


@pytest.mark.slow
def test_experts_in_mxfp4_are_those_in_bfloat16(tmp_path):
  """The same blocks, as they are and decoded by transformers."""
  sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2)
  model = oracle.make('gpt_oss', **sizes).to(torch.bfloat16)
  rng, packed = np.random.default_rng(0), {}
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith(('gate_up_proj', 'down_proj')):
        E, inputs, outputs = value.shape
        shape = E, outputs, inputs // 32
        blocks = torch.tensor(rng.integers(0, 256, (*shape, 16), np.uint8))
        scales = torch.tensor(rng.integers(121, 126, shape, np.uint8))
        value.copy_(hf_mxfp4.convert_moe_packed_tensors(blocks, scales))
        packed[name] = dict(blocks=blocks, scales=scales)
  plain, quantized, exported = (tmp_path / name for name in 'abc')
  model.save_pretrained(plain)
  tensors = files.load_file(plain / 'model.safetensors')
  for name, arrays in packed.items():
    del tensors[name]
    tensors |= {f'{name}_{suffix}': value for suffix, value in arrays.items()}
  quantized.mkdir()
  files.save_file(tensors, quantized / 'model.safetensors')
  config = read_json(plain / 'config.json')
  config['quantization_config'] = {'quant_method': 'mxfp4'}
  (quantized / 'config.json').write_text(json.dumps(config))
  from_quantized, from_plain = interop.load(quantized), interop.load(plain)
  folders.assert_equal(from_quantized.variables, from_plain.variables)
  # The exported tensors are in bfloat16, as transformers would write them.
  interop.save(
    from_quantized.options, from_quantized.variables, exported, config=config
  )
  assert 'quantization_config' not in read_json(exported / 'config.json')
  oracle.check_same_weights(model, exported)
