"""Bytes that a model needs, by formula: weights, cache, activations, exchanges.

Gradients, the state of an optimizer and temporary arrays are not counted.
"""

import dataclasses
from typing import NamedTuple

from moe_jax.analysis import counts
from moe_jax.analysis.counts import Half, group_rows, group_size, halves
from moe_jax.errors import InputError
from moe_jax.layers.ffn import ACTIVATIONS, FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.parameters import Role
from moe_jax.models import Model
from moe_jax.models.stack import KEPT, kept_names

# Bytes of a stored value, by type. The scales of int8 kernels, one for each
# output column, are not counted.
DTYPES = {'float32': 4, 'bfloat16': 2, 'int8': 1}


def weight_bytes(model: Model, dtype: str) -> int:
  """Bytes of all parameters, with kernels and embedding tables in `dtype`.

  Parameters of routers, norms and relative positions stay float32, as they are
  stored.

  Args:
    model: A model of Transformer blocks.
    dtype: One of `DTYPES`.
  """
  total = 0
  for p in counts.sized_parameters(model):
    # Attention's only table is that of relative positions.
    is_float32 = p.role.role in ('router', 'norm')
    is_float32 |= p.role == Role('attention', 'table')
    total += p.size * (4 if is_float32 else DTYPES[dtype])
  return total


def cache_bytes(
  model: Model, batch_size: int, max_len: int, encoder_len: int = 0
) -> int:
  """Bytes of the decoder's cache: keys, values, and the position of each row.

  Args:
    model: A model of Transformer blocks.
    batch_size: Number of rows that are generated at once.
    max_len: Number of tokens of a row, its prompt included.
    encoder_len: Number of tokens that the encoder reads, whose keys and values
      cross-attention keeps.
  """
  *_, decoder = halves(model, encoder_len or max_len, max_len)
  # Generation does not stack the parameters of layers.
  stack = dataclasses.replace(decoder.stack, stacked=False)
  memory_len = encoder_len if decoder.memory_len else 0
  slots = sum(stack.cache_lengths(max_len)) + memory_len * len(stack.sparse)
  # Besides keys and values, the cache has a flag of a byte for each slot, a
  # row's next position and last token (8 bytes), and its own length (4 bytes).
  flags = max_len + memory_len
  cached_bytes = slots * decoder.attention.cached_values * decoder.itemsize
  return batch_size * (cached_bytes + flags + 8) + 4


class Activations(NamedTuple):
  """Bytes that the forward pass leaves for the backward pass.

  The compiler may keep fewer bytes, and compute elementwise functions again.

  Attributes:
    layers: Bytes kept by all layers, without attention scores, under the
      model's `remat`. Masks of dropout are not counted.
    scores: Bytes of attention's scores, in float32 and in the type of the
      activations, and of the bias of relative positions. A fused kernel of
      attention keeps none of them.
    logits: Bytes of the decoder's output logits, in float32, that are computed
      at once.
  """

  layers: int
  scores: int
  logits: int


def activations(
  model: Model, batch_size: int, seq_len: int, target_len: int = 0
) -> Activations:
  """Bytes of activations in a training step on one batch or microbatch.

  `batch_size` is its number of sequences, of `seq_len` tokens each; the decoder
  of an encoder-decoder has `target_len`, or `seq_len` where that is 0.
  """
  stacks = halves(model, seq_len, target_len)
  return Activations(
    layers=sum(_kept_by_layers(half, batch_size) for half in stacks),
    scores=sum(_kept_scores(half, batch_size) for half in stacks),
    logits=_logits(model, batch_size * stacks[-1].length),
  )


def evaluation(
  model: Model, batch_size: int, seq_len: int, target_len: int = 0
) -> int:
  """Bytes of activations in an evaluation of one batch or microbatch.

  Without a backward pass only a layer's output outlives the layer. So the bytes
  are those of the logits and of one sparse layer's products, with that layer's
  share of the dense layers' products and of attention's scores. The sizes are
  those of `activations`: sequences, their tokens, and a decoder's tokens.
  """
  layer, stacks = 0, halves(model, seq_len, target_len)
  for half in stacks:
    stack, scores = half.stack, _kept_scores(half, batch_size)
    half = half._replace(stack=dataclasses.replace(stack, remat='dots'))
    kept = _kept_by_layers(half, batch_size) + scores
    layer = max(layer, kept // (len(half.moes) or len(stack.sparse)))
  return _logits(model, batch_size * stacks[-1].length) + layer


def _logits(model: Model, num_tokens: int) -> int:
  """Bytes of the float32 logits that are computed at once."""
  total = 4 * num_tokens * model.vocab_size
  block = model.embedding.options.block_mb * 2**20
  return min(total, block) if block else total


def _kept_by_layers(half: Half, B: int) -> int:
  """Bytes that layers keep for the backward pass, without attention scores."""
  c, block, moe = half.stack, half.stack.block, half.moe
  n, L, M = B * half.length, len(c.sparse), half.width
  b = half.itemsize
  total = L * n * M * b + n * M * (3 * 4 + b)  # inputs, and the final norm
  names, a, crosses = kept_names(c.remat), half.attention, block.cross
  keeps_all = names is None
  kept = {*KEPT} if names is None else {*names}
  rows = sum(expert_rows(layer_moe, B, half.length) for layer_moe in half.moes)
  output = L * n * a.num_heads * a.head_widths[1] * b  # of one attention
  # The dense feed-forwards that follow those of experts within a layer.
  has_extra = block.moe is not None and block.moe.extra_ffn
  extra = sum(c.sparse) if has_extra else 0
  if 'attention' in kept:
    total += output * (1 + crosses)
  if 'rows' in kept:
    total += rows * M * b
  if 'products' in kept:
    total += L * n * (a.projected_values + M) * b + rows * M * b
    total += n * 4 * sum(layer_moe.num_experts for layer_moe in half.moes)
    if crosses:
      cached = B * half.memory_len * a.cached_values
      total += output + L * (n * M + cached) * b
  if kept & {'products', 'hidden'}:
    total += (
      (L - sum(c.sparse) + extra) * n * _kept_hidden(half, block.ffn, keeps_all)
    )
    if block.moe is not None and moe is None:  # a dense twin
      hidden = _kept_hidden(half, block.moe.twin().ffn, keeps_all)
      total += sum(c.sparse) * n * hidden
    if moe is not None:
      # Products without slots have a gradient that keeps their inputs alone.
      keeps_slots = keeps_all and moe.dispatch.by_slot
      total += rows * _kept_hidden(half, moe.expert.twin(1).ffn, keeps_slots)
      if (shared := moe.shared_twin) is not None:
        hidden = _kept_hidden(half, shared.ffn, keeps_all)
        total += len(half.moes) * n * hidden
  if keeps_all:
    # Each norm keeps three float32 arrays, and its output twice, once as what
    # the next product multiplies. Two arrays [n, M] a layer, its input and what
    # attention adds to it, are in the total already.
    norms = L * (2 + crosses) + extra
    total += norms * n * M * (3 * 4 + 2 * b) - 2 * L * n * M * b
  return total


def _kept_hidden(half: Half, ffn: FfnOptions, keeps_all: bool) -> int:
  """Bytes of the hidden values that a feed-forward keeps for each input vector.

  Args:
    half: The stack that the feed-forward belongs to.
    ffn: The width and the activation of the feed-forward.
    keeps_all: Whether arrays between products are kept too.
  """
  b, act = half.itemsize, ACTIVATIONS[ffn.activation]
  if not keeps_all:
    return len(act.kernels) * ffn.hidden * b
  signs = ffn.hidden if act.cheap else 0
  return act.saved_arrays * ffn.hidden * b + signs


def _kept_scores(half: Half, B: int) -> int:
  """Bytes of attention's scores that a stack keeps for the backward pass."""
  c, block = half.stack, half.stack.block
  T, H = half.length, block.attention.num_heads
  has_bias = block.positions.bias(H, block.causal, 'bias') is not None
  bias = 4 * H * T * T if has_bias else 0
  if c.remat != 'none':
    return bias
  return bias + len(c.sparse) * B * H * T * half.keys * (4 + half.itemsize)


def expert_rows(moe: MoeOptions, batch_size: int, length: int) -> int:
  """Number of vectors [M] that a layer's experts compute for a batch.

  Vectors of slots without a token are counted, too.

  Args:
    moe: The options of the layer.
    batch_size: Number of sequences in the batch.
    length: Number of tokens of a sequence.
  """
  S = group_size(moe, batch_size, length)
  return -(-batch_size * length // S) * group_rows(moe, S)


def dispatch_bytes(half: Half, batch_size: int) -> int:
  """Bytes of the vectors that a sparse layer sends to its experts, and back.

  A dispatch by masks also has a mask of one byte for each of the group's
  tokens, choices and slots, [G, S, K, E, C]. Where experts choose tokens, the
  mask has no dimension K.

  Args:
    half: A stack with sparse layers; the result is for its last one.
    batch_size: Number of sequences in the batch.
  """
  moe, masks = half.moes[-1], 0
  if moe.dispatch.by_mask:
    S = group_size(moe, batch_size, half.length)
    masks = S * (1 if moe.router.by_expert else moe.num_selected)
  num_rows = expert_rows(moe, batch_size, half.length)
  return num_rows * (2 * half.width * half.itemsize + masks)


def exchange_bytes(half: Half, batch_size: int, num_parts: int) -> int:
  """Bytes that one device sends in one exchange of one sparse layer.

  The batch and the experts are each split over `num_parts` devices; a device
  sends the rows of other devices' experts (a row is the vector [M] of a slot),
  or, where tokens are gathered instead, all its tokens to each other device. A
  layer has two exchanges, to the experts and back, and two more in the backward
  pass. The bytes of dropless layers are counted as if all devices got equally
  many rows. Shadowed experts, which are sent to all devices instead of their
  rows, are not considered, nor are rows for which a device has no room.

  Args:
    half: A stack with sparse layers; the result is for its last one.
    batch_size: Number of sequences in the batch.
    num_parts: Number of these devices.

  Raises:
    ValueError: The number of experts does not divide by the devices.
  """
  moe = half.moes[-1]
  E = moe.num_retained
  if num_parts < 1 or E % num_parts:
    raise InputError(f'a split of {num_parts} does not divide num_experts={E}')
  vector, others = half.width * half.itemsize, num_parts - 1
  if moe.dispatch.exchange.gathers:
    return batch_size * half.length * vector * others // num_parts
  rows = expert_rows(moe, batch_size, half.length)
  return rows * vector * others // num_parts**2
