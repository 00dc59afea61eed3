"""transformers' gpt-oss (https://arxiv.org/abs/2508.10925) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Every second layer attends to a window, and each head has a sink: a learned
  logit in the softmax that belongs to no value.
- All projections, routers and experts have biases. Gates are the softmax of the
  chosen logits, which is the same as probabilities among all experts divided by
  their sum.
- Experts have a clamped activation; gate and up alternate in one tensor.

Published files hold experts in MXFP4, a format of 4-bit numbers; an export has
bfloat16. Blocks of 32 numbers share a scale, which is a power of two (OCP
Microscaling Formats 1.0). Files have the tensor `name` as `name_blocks`, uint8
[E, N, M / 32, 16], two numbers a byte with the first in the lower half, and
`name_scales`, uint8 [E, N, M / 32], for kernels of M inputs and N outputs. They
are read as one bfloat16 tensor [E, M, N], exactly unless a scale is extreme.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.interop import decoders
from moe_jax.interop.config_keys import LENGTH, Values
from moe_jax.interop.decoders import layer
from moe_jax.interop.tensor_files import (
  Index,
  ProblemsError,
  TensorFiles,
  TensorSpec,
)
from moe_jax.layers.experts import FeedForwardExpert
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

_BLOCK = 32
_BLOCKS, _SCALES = '_blocks', '_scales'
_BIAS = 127  # added to the exponents of two
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)


class Mxfp4Files(TensorFiles):
  """The tensors of a folder; tensors in MXFP4 appear decoded.

  Raises:
    ValueError: `TensorFiles` cannot read the folder; or blocks and scales do
      not fit, and all problems are listed.
  """

  def __init__(self, folder: pathlib.Path):
    super().__init__(folder)
    self._packed: set[str] = set()
    problems = []
    for blocks in [name for name in self.specs if name.endswith(_BLOCKS)]:
      name = blocks.removesuffix(_BLOCKS)
      problem = self._problem(name)
      if problem:
        problems.append(problem)
        continue
      E, N, count, _ = self.specs.pop(blocks).shape
      del self.specs[name + _SCALES]
      self.specs[name] = TensorSpec((E, count * _BLOCK, N), 'bfloat16')
      self._packed.add(name)
    if problems:
      raise ProblemsError(f'{folder} cannot be read', problems)

  def _problem(self, name: str) -> str:
    """The reason why `name`, in MXFP4, cannot be decoded; '' if it can."""
    blocks = self.specs[name + _BLOCKS]
    scales = self.specs.get(name + _SCALES)
    if name in self.specs:
      return f'{name} is there twice, with and without blocks'
    if scales is None:
      return f'{name}{_BLOCKS} has no {name}{_SCALES}'
    if (blocks.dtype, scales.dtype) != ('U8', 'U8'):
      return f'{name}: blocks are {blocks.dtype}, scales {scales.dtype}, not U8'
    if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, _BLOCK // 2):
      return (
        f'{name}: blocks are {list(blocks.shape)} and scales '
        f'{list(scales.shape)}, which are no [E, N, M / 32, 16] and '
        '[E, N, M / 32]'
      )
    return ''

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """A copy of a tensor's slice `index`, None for all; MXFP4 as bfloat16."""
    if name not in self._packed:
      return super().read(name, index)
    if index is None:
      index = tuple(slice(0, size) for size in self.specs[name].shape)
    experts, inputs, outputs = (
      slice(*part.indices(size)[:2])
      for part, size in zip(index, self.specs[name].shape, strict=True)
    )
    first_block = inputs.start // _BLOCK
    rows = slice(first_block, -(-inputs.stop // _BLOCK))
    start = inputs.start - first_block * _BLOCK
    stop = start + inputs.stop - inputs.start
    sizes = (part.stop - part.start for part in (experts, inputs, outputs))
    numbers = np.empty(tuple(sizes), ml_dtypes.bfloat16)
    # Experts are decoded one at a time, as decoding takes about five times as
    # much memory as the numbers that it gives.
    for i, expert in enumerate(range(experts.start, experts.stop)):
      index = slice(expert, expert + 1), outputs, rows
      scales = super().read(name + _SCALES, index)
      nibbles = slice(0, _BLOCK // 2)
      blocks = super().read(name + _BLOCKS, (*index, nibbles))
      numbers[i] = decode(blocks, scales)[0, :, start:stop].T
    return numbers


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """The numbers in blocks of MXFP4.

  Args:
    blocks: C blocks of 32 numbers, two numbers a byte, uint8 [..., C, 16].
    scales: Each block's exponent of two, plus 127, uint8 [..., C].

  Returns:
    bfloat16 [..., C * 32].
  """
  numbers = np.empty((*blocks.shape, 2), np.float32)
  numbers[..., 0] = _NUMBERS[blocks & 0xF]
  numbers[..., 1] = _NUMBERS[blocks >> 4]
  numbers = numbers.reshape(*scales.shape, _BLOCK)
  exponents = scales.astype(np.int32)[..., None] - _BIAS
  values = np.ldexp(numbers, exponents).astype(ml_dtypes.bfloat16)
  return values.reshape(*scales.shape[:-1], -1)


_ROPE = dict(
  rope_theta=150_000.0,
  rope_type='yarn',
  factor=32.0,
  beta_fast=32.0,
  beta_slow=1.0,
  truncate=False,
  original_max_position_embeddings=4096,
)
KEYS = decoders.keys(
  dict(
    vocab_size=201088,
    hidden_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    attention_bias=True,
    layer_types=None,
    intermediate_size=2880,
    num_local_experts=128,
    num_experts_per_tok=4,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
  ),
  honoured={
    'sliding_window': (LENGTH, 128),
    'quantization_config': (dict | None, None),
  },
  fixed={'swiglu_alpha': (1.702,), 'swiglu_limit': (7.0,)},
  # These keys repeat `original_max_position_embeddings` of rope_scaling and
  # `num_experts_per_tok`, which are read.
  ignored=('initial_context_length', 'experts_per_token'),
)


def _problems(c: Values) -> Iterator[str]:
  yield from decoders.gate_problems(c)
  if c.hidden_act != 'silu':
    yield f"hidden_act={c.hidden_act!r} is not supported, only 'silu'"
  method = (c.quantization_config or {}).get('quant_method')
  if method not in (None, 'mxfp4'):
    yield f"quant_method={method!r:.80} is not supported, only 'mxfp4'"


def _options(c: Values) -> dict[str, Any]:
  expert = FeedForwardExpert(
    hidden=c.intermediate_size, activation='clamped_swiglu', bias='all'
  )
  return dict(
    router=TokenChoice(gates='renormalized', use_bias=True),
    attention=decoders.heads(c, sinks=True),
    moe=dict(expert=expert),
  )


def _describe(o: DecoderOptions) -> dict[str, Any]:
  return dict(hidden_act='silu', sliding_window=o.attention.window or 128)


_GATE_UP = 'mlp.experts.gate_up_proj'
ARCHITECTURES = (
  decoders.decoder(
    'gpt_oss',
    'GptOss',
    KEYS,
    {
      **decoders.DECODER,
      **layer('attention/sinks', ('self_attn.sinks', 'H')),
      **decoders.router('mlp.router'),
      **layer('moe/router/b', ('mlp.router.bias', 'E')),
      **layer('moe/experts/w_gate', (_GATE_UP, 'E M (F 0/2) -> E M F')),
      **layer('moe/experts/w_in', (_GATE_UP, 'E M (F 1/2) -> E M F')),
      **layer('moe/experts/b_gate', (f'{_GATE_UP}_bias', 'E (F 0/2) -> E F')),
      **layer('moe/experts/b_in', (f'{_GATE_UP}_bias', 'E (F 1/2) -> E F')),
      **layer('moe/experts/w_out', ('mlp.experts.down_proj', 'E F M')),
      **layer('moe/experts/b_out', ('mlp.experts.down_proj_bias', 'E M')),
    },
    options=_options,
    describe=_describe,
    problems=_problems,
    rope=_ROPE,
    files=Mxfp4Files,
  ),
)
