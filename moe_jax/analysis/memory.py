"""Bytes that a model needs, by formula: weights, caches, activations, buffers.

Arrays of a program's own that live for a moment are not counted, nor gradients
and an optimizer's state. Not here: how much a device has (`devices.py`).
"""

from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.analysis.halves import (
  Half,
  counted,
  group_size,
  halves,
  is_dropless,
)
from moe_jax.layers.block import BlockConfig
from moe_jax.layers.ffn import FfnOptions, activation
from moe_jax.layers.moe import MoeOptions
from moe_jax.layers.parameters import Role
from moe_jax.models import Model
from moe_jax.options import unknown

# Bytes of a stored number. int8 stands for a byte a weight; the scales that go
# with it, one a column, are not counted.
DTYPES = {'float32': 4, 'bfloat16': 2, 'int8': 1}


def weight_bytes(model: Model, dtype: str, seq_len: int) -> int:
  """Of all parameters, with kernels and tables of embeddings in `dtype`.

  Routers, norms and relative positions stay float32, as they are stored.

  Raises:
    ValueError: The dtype is none of `DTYPES`.
  """
  if dtype not in DTYPES:
    raise unknown('dtype', dtype, DTYPES)
  return sum(
    p.size * (4 if _stays_float32(p.role) else DTYPES[dtype])
    for p in counted(model, seq_len)
  )


def _stays_float32(role: Role) -> bool:
  # The table of relative positions belongs to attention.
  table = role == Role('attention', 'table')
  return role.role in ('router', 'norm') or table


def cache_bytes(
  model: Model,
  batch_size: int,
  max_len: int,
  encoder_len: int = 0,
  dtype: str = '',
) -> int:
  """Of the keys and values of every decoder layer, and what goes with them.

  Args:
    model: Either kind.
    batch_size: Rows that are generated at once.
    max_len: Tokens of a row, its prompt included.
    encoder_len: Tokens that the encoder reads, whose keys and values
      cross-attention keeps.
    dtype: Of keys and values; '' is that of the model's activations.
  """
  *_, decoder = halves(model, encoder_len or max_len, max_len)
  block = decoder.stack.block
  a = block.attention.within(model.embedding.width)
  itemsize = jnp.dtype(dtype or block.shared.dtype).itemsize
  slot = 2 * len(decoder.stack.sparse) * a.num_kv_heads * a.head_width
  slots = max_len + (encoder_len if decoder.memory_len else 0)
  # A flag a slot; every row's next position and last token; the cache's length.
  return batch_size * slots * (slot * itemsize + 1) + 8 * batch_size + 4


def serving_bytes(
  model: Model,
  dtype: str,
  batch_size: int,
  seq_len: int,
  target_len: int = 0,
) -> int:
  """Weights in `dtype` and a full cache; int8 weights have a bfloat16 cache.

  Args:
    model: Either kind.
    dtype: One of `DTYPES`.
    batch_size: Rows that are generated at once.
    seq_len: Tokens of a row; of an encoder-decoder T_enc.
    target_len: T_dec of an encoder-decoder; 0 is `seq_len`.
  """
  *_, last = halves(model, seq_len, target_len)
  kept = 'float32' if dtype == 'float32' else 'bfloat16'
  weights = weight_bytes(model, dtype, seq_len)
  return weights + cache_bytes(
    model, batch_size, last.length, last.memory_len, kept
  )


class Activations(NamedTuple):
  """What the forward pass leaves for the backward pass, in bytes.

  XLA may keep less, and compute elementwise functions again.

  Attributes:
    layers: Of all layers, without scores, as `model.remat` has it. Masks of
      dropout are not counted.
    scores: Attention's, float32 and in the model's dtype, and the bias of
      relative positions: where no fused kernel does without them.
    logits: Float32, of the decoder.
  """

  layers: int
  scores: int
  logits: int


def activations(
  model: Model, batch_size: int, seq_len: int, target_len: int = 0
) -> Activations:
  """Of a training step of one batch (a microbatch, where there are any)."""
  layers = scores = 0
  parts = halves(model, seq_len, target_len)
  for half in parts:
    layers += _kept_by_layers(half, model.embedding.width, batch_size)
    scores += _kept_scores(half, batch_size)
  logits = 4 * batch_size * parts[-1].length * model.vocab_size
  return Activations(layers, scores, logits)


def _kept_by_layers(half: Half, M: int, B: int) -> int:
  c, n, L = half.stack, B * half.length, len(half.stack.sparse)
  block, b = c.block, jnp.dtype(c.block.shared.dtype).itemsize
  every = c.remat == 'none'
  total = L * n * M * b + n * M * (3 * 4 + b)  # inputs, and the final norm
  if c.remat == 'full':
    return total
  a, crosses = block.attention.within(M), block.cross
  query, keys = a.num_heads * a.head_width, 2 * a.num_kv_heads * a.head_width
  total += L * n * (query + keys + M) * b
  if crosses:
    total += L * (n * (query + M) + B * half.memory_len * keys) * b
  moe, sparse = half.moe, half.num_sparse
  extra = sum(c.sparse) if block.moe is not None and block.moe.extra_ffn else 0
  dense = L - sum(c.sparse) + extra
  total += dense * n * _kept_hidden(block, block.ffn, every)
  if block.moe is not None and moe is None:
    twin = block.moe.twin().ffn
    total += sum(c.sparse) * n * _kept_hidden(block, twin, every)
  if moe is not None:
    # The products without slots have a gradient that keeps their inputs alone.
    expert = moe.expert.twin(1).ffn
    hidden = _kept_hidden(block, expert, every and moe.dispatch.by_slot)
    rows = expert_rows(moe, B, half.length)
    total += sparse * rows * (hidden + M * b)
    total += sparse * n * 4 * moe.num_experts
  if every:
    # Three float32 arrays of each norm, and its output twice, once as what
    # the next product multiplies; what attention gave; an expert's input.
    norms = L * (2 + crosses) + extra
    total += norms * n * M * (3 * 4 + 2 * b) - 2 * L * n * M * b
    total += L * n * query * b * (1 + crosses)
    if sparse:
      total += sparse * rows * M * b
  return total


def _kept_hidden(block: BlockConfig, ffn: FfnOptions, every: bool) -> int:
  """Bytes kept per row of a feed-forward, as wide as its hidden values."""
  b, act = jnp.dtype(block.shared.dtype).itemsize, activation(ffn.activation)
  if not every:
    return (1 + act.gated) * ffn.hidden * b
  signs = ffn.hidden if act.cheap else 0
  return act.kept * ffn.hidden * b + signs


def _kept_scores(half: Half, B: int) -> int:
  c, block = half.stack, half.stack.block
  T, H = half.length, block.attention.num_heads
  has_bias = block.positions.bias(H, block.causal, 'bias') is not None
  bias = 4 * H * T * T if has_bias else 0
  if c.remat != 'none':
    return bias
  per_score = 4 + jnp.dtype(block.shared.dtype).itemsize
  return bias + len(c.sparse) * B * H * T * half.keys * per_score


def expert_rows(moe: MoeOptions, batch_size: int, length: int) -> int:
  """Rows that all experts of a layer have together, filled or not."""
  S = group_size(moe, batch_size, length)
  groups = -(-batch_size * length // S)
  per_expert = moe.router.training_slots(moe.sizes, S)
  slots = groups * moe.num_experts * per_expert
  if is_dropless(moe):
    return min(groups * S * moe.num_selected, slots)
  return slots


def dispatch_bytes(half: Half, width: int, batch_size: int) -> int:
  """Bytes of a sparse layer's buffers: rows to the experts, and rows back.

  A dispatch by masks also has one of them, [G, S, K, E, C] of one byte, which
  has no K where experts choose.
  """
  moe = half.moe
  if moe is None:
    return 0
  rows = expert_rows(moe, batch_size, half.length)
  itemsize = jnp.dtype(half.stack.block.shared.dtype).itemsize
  masks = 0
  if moe.dispatch.by_mask:
    # Every token of a group has a flag for each of the group's slots.
    S = group_size(moe, batch_size, half.length)
    masks = S * (1 if moe.router.by_expert else moe.num_selected) * rows
  return 2 * rows * width * itemsize + masks


def all_to_all_bytes(
  half: Half, width: int, batch_size: int, num_parts: int
) -> int:
  """Sent by one device in one exchange of one sparse layer.

  The batch and the experts are each split over `num_parts` devices; of the
  rows that a device has, all but its own experts' go to others. A layer
  exchanges twice, to the experts and back, and again in the backward pass.
  Layers without capacity have no exchange here, they gather the kernels; this
  is what one would send.

  Raises:
    ValueError: The experts or the rows do not divide.
  """
  moe = half.moe
  if moe is None:
    return 0
  E = moe.num_experts
  if num_parts < 1 or E % num_parts:
    raise ValueError(
      f'expert parallelism of {num_parts} does not divide num_experts={E}'
    )
  rows = expert_rows(moe, batch_size, half.length)
  sent = rows * width * jnp.dtype(half.stack.block.shared.dtype).itemsize
  return sent * (num_parts - 1) // num_parts**2
