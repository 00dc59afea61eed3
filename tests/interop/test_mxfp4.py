"""Tensors in MXFP4 against transformers' decoding, and damaged ones."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.interop.gpt_oss import Mxfp4Files, decode

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


def test_numbers_are_those_of_transformers():
  torch = pytest.importorskip('torch')
  hf_mxfp4 = pytest.importorskip('transformers.integrations.mxfp4')
  blocks, scales = packed(np.random.default_rng(0))
  expected = hf_mxfp4.convert_moe_packed_tensors(
    torch.tensor(blocks), torch.tensor(scales), dtype=torch.bfloat16
  )
  np.testing.assert_array_equal(
    decode(blocks, scales).swapaxes(1, 2).astype(np.float32),
    expected.float().numpy(),
  )


def test_a_slice_is_that_of_the_whole(tmp_path):
  blocks, scales = packed(np.random.default_rng(1))
  plain = np.ones((2, 3), np.float32)
  tensors = {'w_blocks': blocks, 'w_scales': scales, 'plain': plain}
  save_file(tensors, tmp_path / 'model.safetensors')
  files = Mxfp4Files(tmp_path)
  assert files.specs['w'].shape == (E, 32 * C, N)
  assert files.specs.keys() == {'w', 'plain'}
  assert files.largest == 2 * E * 32 * C * N
  whole = files.read('w')
  for index in (
    (slice(1, 3), slice(30, 35), slice(2, 4)),
    (slice(0, 1), slice(32, 64), slice(0, N)),
    (slice(None), slice(5, 6), slice(None)),
  ):
    np.testing.assert_array_equal(files.read('w', index), whole[index])
  np.testing.assert_array_equal(files.read('plain'), plain)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop('w_scales'), 'w_blocks has no w_scales'),
    (
      lambda t: t.update(w_scales=t['w_scales'][:, 1:].copy()),
      r'blocks are \[3, 5, 2, 16\] and scales \[3, 4, 2\]',
    ),
    (
      lambda t: t.update(w_scales=t['w_scales'].astype(np.float32)),
      'blocks are U8, scales float32, not U8',
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
