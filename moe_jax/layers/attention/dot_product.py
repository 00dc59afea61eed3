"""Scaled dot-product attention within segments, fused if the platform can."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from moe_jax.errors import InputError
from moe_jax.kernels.cpu import add_to_each
from moe_jax.layers.attention import blockwise
from moe_jax.layers.attention.keys import Keys, masked_softmax, visible
from moe_jax.parallel.heads import on_rows_and_heads
from moe_jax.shapes import Array, Float, Float32, Int, checked

IMPLEMENTATIONS = ('auto', 'blocks', 'cudnn', 'einsum', 'splash', 'xla')
HALF = ('bfloat16', 'float16')
# The TPU kernel 'splash' needs a length that is a multiple of the first number.
# The sides of its blocks are tried in order: larger blocks make fewer steps.
_LEAST_BLOCK, _BLOCKS = 128, (512, 256, 128)


@checked
def attend(
  query: Float[Array, 'B T H D'],
  key: Float[Array, 'B S N D'],
  value: Float[Array, 'B S N U'],
  segment_ids: Int[Array, 'B T'] | None,
  *,
  key_segment_ids: Int[Array, 'B S'] | None = None,
  keys: Keys = Keys(),
  implementation: str = 'auto',
  bias: Float32[Array, 'H T S'] | None = None,
  sinks: Float32[Array, ' H'] | None = None,
  dropout: Callable[[Array], Array] | None = None,
  checked_alone: bool = False,
) -> Float[Array, 'B T H U']:
  """Each token's weighted mean of the values it sees; the softmax is float32.

  H / N consecutive query heads share one head of keys and values. Values may
  have another width than keys.

  Args:
    query: The queries, unscaled.
    key: The key of every token.
    value: The value of every token.
    segment_ids: The segment of each query. A token sees its own segment alone,
      padding (0) included; None: each row is one segment.
    key_segment_ids: The segment of each key; None: the segments of the queries
      or, in another sequence, one segment for each row.
    keys: The rules for which of the segment's keys a token sees.
    implementation: One of `IMPLEMENTATIONS`, which the option of this name
      describes; 'auto' picks one by platform and by the other arguments.
    bias: The bias that is added to the scaled scores; None: no bias.
    sinks: The logit of each head that stands beside the scores in the
      denominator of the softmax, and weighs no value; None: no sinks.
    dropout: A function that drops some of the weights; None drops none.
    checked_alone: Whether the implementation is only checked, while einsum
      computes: where parameters are initialised the output is not used, and
      arrays are on no mesh yet.

  Raises:
    ValueError: The implementation cannot serve the options or this machine.
  """
  is_other = keys.cross or key_segment_ids is not None
  misfits = _misfits(query, value, is_other, bias, sinks, dropout)
  if reason := misfits.get(implementation):
    raise InputError(
      f"attention={implementation!r}: {reason}; 'auto' serves it"
    )
  if key_segment_ids is None and not keys.cross:
    key_segment_ids = segment_ids
  arrays = query, key, value, segment_ids, key_segment_ids
  options = dict(keys=keys, bias=bias, sinks=sinks)
  plain = functools.partial(einsum, dropout=dropout, **options)
  in_blocks = functools.partial(blockwise.blocks, **options)
  kernel = functools.partial(_of_one_width, splash, keys=keys, sinks=sinks)
  if checked_alone or implementation == 'einsum':
    return plain(*arrays)
  if implementation == 'blocks':
    return in_blocks(*arrays)
  if implementation == 'splash':
    emulated = functools.partial(kernel, interpret=True)
    return jax.lax.platform_dependent(*arrays, default=emulated, tpu=kernel)
  # Tracing cuDNN's attention needs NVIDIA's library, so here the machine
  # decides, not the platform that the program is lowered for.
  capability = _cuda_capability()
  if implementation == 'cudnn' and not capability:
    raise InputError(
      f"attention='cudnn' needs an NVIDIA GPU, not {jax.default_backend()!r}"
    )
  widest = 256 if capability >= 9 else 128
  fits = capability >= 8 and max(query.shape[3], value.shape[3]) <= widest
  if implementation == 'auto' and fits and 'cudnn' not in misfits:
    implementation = 'cudnn'
  if implementation != 'auto':
    library = functools.partial(jax_nn, implementation=implementation)
    return _of_one_width(library, *arrays, keys=keys, bias=bias)
  by_platform = {}
  if 'blocks' not in misfits:
    by_platform['cpu'] = in_blocks
  if 'splash' not in misfits:
    by_platform['tpu'] = kernel
  if not by_platform:
    return plain(*arrays)
  return jax.lax.platform_dependent(*arrays, default=plain, **by_platform)


def _misfits(query, value, is_other, bias, sinks, dropout) -> dict[str, str]:
  """The reasons why implementations cannot serve these arguments, by name.

  An implementation that can serve them is left out. `is_other` tells whether
  keys are another sequence's or have segments of their own; bias, sinks and
  dropout may be None.
  """
  dtype, T = str(query.dtype), query.shape[1]
  D = max(query.shape[3], value.shape[3])
  no_dropout = (dropout is not None, 'it has no dropout')
  no_bias = (bias is not None, 'it has no relative positions')
  no_sinks = (sinks is not None, 'it has no attention sinks')
  rules = {
    'blocks': (no_dropout,),
    'cudnn': (
      (dtype not in HALF, f'dtype={dtype!r} is none of {list(HALF)}'),
      (D % 8 or D > 256, f'head_width={D} is no multiple of 8 up to 256'),
      (T % 2, f'seq_len={T} is odd'),
      no_bias,
      no_sinks,
      no_dropout,
    ),
    'splash': (
      (T % _LEAST_BLOCK, f'seq_len={T} is no multiple of {_LEAST_BLOCK}'),
      (is_other, 'it has no keys of another sequence'),
      no_bias,
      no_dropout,
    ),
    'xla': (no_dropout, no_sinks),
  }
  unmet = {
    name: [reason for is_unmet, reason in reasons if is_unmet]
    for name, reasons in rules.items()
  }
  return {name: reasons[0] for name, reasons in unmet.items() if reasons}


def _cuda_capability() -> float:
  """The compute capability of the first device; 0.0 if it is no NVIDIA GPU."""
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or 'NVIDIA' not in device.device_kind:
    return 0.0
  return float(device.compute_capability)


def _of_one_width(f, query, key, value, *ids, keys, **options):
  """The result [B, T, H, U] of f, which needs keys as wide as values.

  Zeros widen keys and queries [..., D], or values [..., U], whichever are
  narrower. f is called as f(query, key, value, *ids, keys=keys, **options),
  where `ids` are the segments of queries and of keys.
  """
  scored, width = key.shape[3], value.shape[3]
  if scored == width:
    return f(query, key, value, *ids, keys=keys, **options)
  keys = keys._replace(scale=keys.scale or scored**-0.5)

  def widened(x):
    padding = max(scored, width) - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding)))

  y = f(*map(widened, (query, key, value)), *ids, keys=keys, **options)
  return y[..., :width]


def einsum(
  query, key, value, ids, key_ids, *, keys, bias, sinks=None, dropout=None
):
  """Attention by two products and a softmax, which supports every option.

  Queries are [B, T, H, D], unscaled, keys [B, S, N, D] and values [B, S, N, U]
  of N heads; the result is the weighted means of values of width U,
  [B, T, H, U]. A query sees keys of its own segment, by `ids` [B, T] and
  `key_ids` [B, S]; if either is None, each row is one segment. `keys` has the
  rules for which of these keys it sees. The bias [H, T, S] is added to scaled
  scores, and the sinks [H] are a logit of each head beside them in the softmax,
  which weighs no value; None: there are none. The function `dropout` drops some
  of the weights; None drops none.
  """
  B, T, H, D = query.shape
  S, N = key.shape[1:3]
  query = keys.scaled(query.reshape(B, T, N, H // N, D))
  scores = jnp.einsum(
    'BTNJD,BSND->BNJTS', query, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    scores = add_to_each(scores, bias.reshape(N, H // N, T, S))
  mask = visible(ids, key_ids, (T, S), keys)
  weights = _weights(scores, mask, sinks).astype(value.dtype)
  if dropout is not None:
    weights = dropout(weights)
  y = jnp.einsum('BNJTS,BSNU->BTNJU', weights, value)
  return y.reshape(B, T, H, value.shape[3])


def cached(
  query: Float[Array, 'B T H D'],
  key: Float[Array, 'B N S D'],
  value: Float[Array, 'B N S U'],
  segment_ids: Int[Array, 'B T'],
  key_segment_ids: Int[Array, 'B S'],
  *,
  keys: Keys,
  start: Int[Array, ''],
  bias: Float32[Array, 'H T _'] | None = None,
  sinks: Float32[Array, ' H'] | None = None,
  slot_numbers: Int[Array, ' S'] | None = None,
) -> Float[Array, 'B T H U']:
  """Each query's weighted mean of cached values; the softmax is float32.

  A causal query sees no slots after its own, filled or not.

  Args:
    query: The queries, unscaled; the first is in slot `start`.
    key, value: The cached keys and values.
    segment_ids: The segment of each query, which sees keys of the same segment.
    key_segment_ids: The segment of each key.
    keys: The rules for which keys of its segment a query sees.
    start: The slot of the first query.
    bias: The bias on the scaled scores of all slots of a row; None: no bias.
    sinks: The logit of each head that stands beside the scores in the softmax
      and weighs no value; None: no sinks.
    slot_numbers: The slot of each key; None: key s is in slot s.
  """
  B, T, H, _ = query.shape
  N, S = key.shape[1:3]
  query = blockwise.queries_by_head(keys.scaled(query), N)
  scores = jnp.einsum(
    'BNRD,BNSD->BNRS', query, key, preferred_element_type=jnp.float32
  )
  scores = scores.reshape(B, N, H // N, T, S)
  if bias is not None:
    if slot_numbers is not None:
      bias = jnp.take(bias, jnp.maximum(slot_numbers, 0), axis=2)
    scores = scores + bias.reshape(1, N, H // N, T, S)
  ids = segment_ids, key_segment_ids
  mask = visible(*ids, (T, S), keys, start, slot_numbers)
  weights = _weights(scores, mask, sinks).astype(value.dtype)
  weights = weights.reshape(B, N, H // N * T, S)
  return blockwise.by_token(jnp.einsum('BNRS,BNSU->BNRU', weights, value), H)


def _weights(scores, mask, sinks) -> Float32[Array, 'B N J T S']:
  """The softmax of scores [B, N, J, T, S] over the keys that a mask shows.

  J = H / N query heads share each of N heads of keys. The mask [b, T, S], where
  b is B or 1, is True at shown keys. `sinks` [H], or None, adds a logit to each
  head's softmax, whose weight is left out.
  """
  if sinks is not None:
    sinks = sinks.reshape(1, *scores.shape[1:3], 1, 1)
  return masked_softmax(scores, mask[:, None, None], sinks)


def jax_nn(query, key, value, ids, key_ids, *, keys, bias, implementation):
  """Calls JAX's own attention, of `implementation` 'xla' or 'cudnn'.

  Queries, unscaled, and result are [B, T, H, D], keys and values [B, S, N, D]
  of N heads. A query sees keys of its own segment, by `ids` [B, T] and
  `key_ids` [B, S], which need a mask [B, 1, T, S] in memory; if `ids` is None,
  each row is one segment. `keys` has the rules for which of these keys it sees.
  The bias is [H, T, S] or None.
  """
  mask = None
  if ids is not None:
    lengths = query.shape[1], key.shape[1]
    mask = visible(ids, key_ids, lengths, Keys(causal=False))[:, None]
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    bias=None if bias is None else bias[None],
    mask=mask,
    scale=keys.scale or None,
    is_causal=keys.causal,
    local_window_size=(keys.window - 1, 0) if keys.window else None,
    implementation=implementation,
  )


def splash(
  query, key, value, ids, key_ids, *, keys, sinks=None, interpret=False
):
  """Attention by the TPU's blockwise kernel, which stores no scores or mask.

  Queries, unscaled, and result are [B, T, H, D], keys and values [B, T, N, D]
  of N heads and the same tokens. A token sees its own segment, by `ids` [B, T]
  (also `key_ids`); None: each row is one segment. `keys` has the rules for
  which of these keys it sees. The sinks [H], or None, are a logit of each head
  in its softmax, which weighs no value. With `interpret` the kernel is
  emulated, for other platforms than TPUs.
  """
  del key_ids  # they are those of the queries

  def local(query, key, value, segment_ids, sinks):
    T, H = query.shape[1:3]
    kernel = _splash_kernel(T, H, keys, interpret)

    def row(query, key, value, ids):
      ids = None if ids is None else splash_attention.SegmentIds(ids, ids)
      return kernel(query, key, value, segment_ids=ids, sinks=sinks)

    q, k, v = (x.swapaxes(1, 2) for x in (keys.scaled(query), key, value))
    y = cast(Array, jax.vmap(row)(q, k, v, segment_ids))
    return y.swapaxes(1, 2)

  return on_rows_and_heads(local, query, key, value, ids, sinks)


def _splash_kernel(T, H, keys, interpret):
  mask = splash_attention.FullMask((T, T))
  if keys.window:
    window = (keys.window - 1, 0)
    mask = splash_attention.LocalMask((T, T), window, offset=0)
  elif keys.causal:
    mask = splash_attention.CausalMask((T, T))
  side = next(block for block in _BLOCKS if T % block == 0)
  names = 'q', 'kv', 'q_dkv', 'kv_dkv', 'q_dq', 'kv_dq'
  sides: dict[str, Any] = {f'block_{name}': side for name in names}
  return splash_attention.make_splash_mha(
    mask=splash_attention.MultiHeadMask([mask] * H),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash_attention.BlockSizes(**sides),
    interpret=interpret,
  )
