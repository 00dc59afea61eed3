"""Scaled dot-product attention within segments, fused where platforms can.

Not here: projections and positions (`attention.py`, `layers/positions.py`).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from moe_jax.kernels.cpu import add_to_each
from moe_jax.partitioning import MESH_AXES, spread
from moe_jax.shapes import Array, Bool, Float, Float32, Int

IMPLEMENTATIONS = ('auto', 'cudnn', 'einsum', 'splash', 'xla')
HALF = ('bfloat16', 'float16')
# The least side of a splash kernel's block, then what is tried first: larger
# blocks make fewer steps.
_LEAST_BLOCK, _BLOCKS = 128, (512, 256, 128)


class Keys(NamedTuple):
  """Which keys a query sees, beside the segments.

  Attributes:
    causal: Whether a query sees no key after its own.
    window: How many keys a query sees up to its own, the last ones; 0: all of
      them. Causal attention alone has a window.
    scale: Factor of the scores before the bias is added; 0.0 is D^-0.5.
    cross: Whether the keys are another sequence's, of any length.
  """

  causal: bool = True
  window: int = 0
  scale: float = 0.0
  cross: bool = False

  def scaled(self, query: Float[Array, '*B D']) -> Float[Array, '*B D']:
    """The query times the scale."""
    return query * (self.scale or query.shape[-1] ** -0.5)


def attend(
  query: Float[Array, 'B T H D'],
  key: Float[Array, 'B S N D'],
  value: Float[Array, 'B S N D'],
  segment_ids: Int[Array, 'B T'] | None,
  *,
  key_segment_ids: Int[Array, 'B S'] | None = None,
  keys: Keys = Keys(),
  implementation: str = 'auto',
  bias: Float32[Array, 'H T S'] | None = None,
  dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, 'B T H D']:
  """Each token's mean of the values it sees; the softmax is float32.

  Query heads are served H / N in a row by one head of keys and values.

  Args:
    query: The queries, unscaled.
    key: The key of every token.
    value: The value of every token.
    segment_ids: The segment of each query. A token sees its own segment alone,
      padding (0) included; None: each row is one segment.
    key_segment_ids: The segment of each key; None: those of the queries.
    keys: Which of the segment's keys a token sees.
    implementation: One of `IMPLEMENTATIONS`; see `AttentionOptions`.
    bias: Numbers that are added to the scaled scores.
    dropout: A function that drops some of the weights.

  Raises:
    ValueError: The implementation cannot serve the options or this machine.
  """
  options = dict(
    dtype=str(query.dtype),
    head_width=query.shape[3],
    seq_len=query.shape[1],
    biased=bias is not None,
    dropout=dropout is not None,
    cross=keys.cross or key_segment_ids is not None,
  )
  if key_segment_ids is None:
    key_segment_ids = segment_ids
  plain = functools.partial(einsum, keys=keys, bias=bias, dropout=dropout)
  library = functools.partial(jax_nn, keys=keys, bias=bias)
  kernel = functools.partial(splash, keys=keys)
  f = _choose(implementation, options, plain, library, kernel)
  return f(query, key, value, segment_ids, key_segment_ids)


def _choose(name, options, plain, library, kernel):
  check(name, **options)
  if name == 'cudnn' and not _cuda_capability():
    raise ValueError(
      f"attention='cudnn' needs an NVIDIA GPU, not {jax.default_backend()!r}"
    )
  if name == 'auto' and _cudnn_serves(options):
    name = 'cudnn'
  if name in ('cudnn', 'xla'):
    return functools.partial(library, implementation=name)
  if name == 'splash':
    emulated = functools.partial(kernel, interpret=True)
    return _by_platform(tpu=kernel, default=emulated)
  if name == 'auto' and not misfit('splash', **options):
    return _by_platform(tpu=kernel, default=plain)
  return plain


def misfit(
  name: str,
  *,
  dtype: str,
  head_width: int,
  seq_len: int = 0,
  biased: bool = False,
  dropout: bool = False,
  cross: bool = False,
) -> str:
  """Why an implementation cannot serve these options; '' where it can.

  With seq_len=0 nothing is said of lengths.
  """
  D, T = head_width, seq_len
  no_dropout = (dropout, 'it has no dropout')
  no_bias = (biased, 'it has no relative positions')
  rules = {
    'cudnn': (
      (dtype not in HALF, f'dtype={dtype!r} is none of {list(HALF)}'),
      (D % 8 or D > 256, f'head_width={D} is no multiple of 8 up to 256'),
      (T % 2, f'seq_len={T} is odd'),
      no_bias,
      no_dropout,
    ),
    'splash': (
      (T % _LEAST_BLOCK, f'seq_len={T} is no multiple of {_LEAST_BLOCK}'),
      (cross, 'it has no keys of another sequence'),
      no_bias,
      no_dropout,
    ),
    'xla': (no_dropout,),
  }
  return next((why for unmet, why in rules.get(name, ()) if unmet), '')


def check(name: str, **options) -> None:
  """Raises ValueError where `misfit` has a reason."""
  if why := misfit(name, **options):
    raise ValueError(f"attention={name!r}: {why}; 'auto' serves it")


def _cudnn_serves(options) -> bool:
  # Tracing it needs NVIDIA's library, so here the machine decides, and not the
  # platform that the program is lowered for.
  capability = _cuda_capability()
  widest = 256 if capability >= 9 else 128
  fits = capability >= 8 and options['head_width'] <= widest
  return fits and not misfit('cudnn', **options)


def _cuda_capability() -> float:
  """The compute capability of this machine's NVIDIA GPU; 0.0 without one."""
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or 'NVIDIA' not in device.device_kind:
    return 0.0
  return float(device.compute_capability)


def _by_platform(tpu, default):
  return functools.partial(jax.lax.platform_dependent, tpu=tpu, default=default)


def visible(
  segment_ids: Int[Array, 'B T'] | None,
  key_segment_ids: Int[Array, 'B S'] | None,
  lengths: tuple[int, int],
  keys: Keys,
  start: int | Int[Array, ''] = 0,
) -> Bool[Array, 'b T S']:
  """Whether the token at place start + t sees the key at place s.

  To be made where it is read, which it fuses into: never kept.
  """
  T, S = lengths
  place = start + jnp.arange(T, dtype=jnp.int32)[None, :, None]
  key_place = jnp.arange(S, dtype=jnp.int32)[None, None, :]
  seen = jnp.ones((1, T, S), bool)
  if keys.causal:
    seen = seen & (place >= key_place)
  if keys.window:
    seen = seen & (place - key_place < keys.window)
  if segment_ids is not None:
    seen = seen & (segment_ids[:, :, None] == key_segment_ids[:, None, :])
  return seen


def masked_softmax(
  scores: Float32[Array, '*B T S'], mask: Bool[Array, '*b T S']
) -> Float32[Array, '*B T S']:
  """Softmax over the keys that `mask` shows; every row shows one."""
  # Added, not selected: a selection keeps the mask, as large as the scores,
  # for a gradient that is zero there anyway.
  hidden = jnp.where(mask, 0, jnp.finfo(scores.dtype).min)
  return jax.nn.softmax(scores + hidden.astype(scores.dtype))


def einsum(
  query, key, value, segment_ids, key_segment_ids, *, keys, bias, dropout=None
):
  """Attention by two products and a softmax: it has every option."""
  B, T, H, D = query.shape
  S, N = key.shape[1:3]
  query = keys.scaled(query.reshape(B, T, N, H // N, D))
  scores = jnp.einsum(
    'BTNJD,BSND->BNJTS', query, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    scores = add_to_each(scores, bias.reshape(N, H // N, T, S))
  mask = visible(segment_ids, key_segment_ids, (T, S), keys)[:, None, None]
  weights = masked_softmax(scores, mask).astype(value.dtype)
  if dropout is not None:
    weights = dropout(weights)
  return jnp.einsum('BNJTS,BSND->BTNJD', weights, value).reshape(B, T, H, D)


def cached(
  query: Float[Array, 'B T H D'],
  key: Float[Array, 'B N S D'],
  value: Float[Array, 'B N S D'],
  segment_ids: Int[Array, 'B T'],
  key_segment_ids: Int[Array, 'B S'],
  *,
  keys: Keys,
  start: Int[Array, ''],
  bias: Float32[Array, 'H T S'] | None = None,
) -> Float[Array, 'B T H D']:
  """`attend` to a cache, whose slots hold heads apart; queries begin at start.

  Slots behind a causal query's own are not seen, filled or not.
  """
  B, T, H, D = query.shape
  N, S = key.shape[1:3]
  query = keys.scaled(query).reshape(B, T, N, H // N, D)
  query = query.transpose(0, 2, 3, 1, 4).reshape(B, N, H // N * T, D)
  scores = jnp.einsum(
    'BNRD,BNSD->BNRS', query, key, preferred_element_type=jnp.float32
  )
  scores = scores.reshape(B, N, H // N, T, S)
  if bias is not None:
    scores = scores + bias.reshape(1, N, H // N, T, S)
  mask = visible(segment_ids, key_segment_ids, (T, S), keys, start)
  weights = masked_softmax(scores, mask[:, None, None]).astype(value.dtype)
  weights = weights.reshape(B, N, H // N * T, S)
  y = jnp.einsum('BNRS,BNSD->BNRD', weights, value)
  y = y.reshape(B, N, H // N, T, D).transpose(0, 3, 1, 2, 4)
  return y.reshape(B, T, H, D)


def jax_nn(
  query, key, value, segment_ids, key_segment_ids, *, keys, bias, implementation
):
  """JAX's own attention; rows of several segments cost it a mask."""
  mask = None
  if segment_ids is not None:
    lengths = query.shape[1], key.shape[1]
    everything = Keys(causal=False)
    mask = visible(segment_ids, key_segment_ids, lengths, everything)[:, None]
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
  query, key, value, segment_ids, key_segment_ids, *, keys, interpret=False
):
  """The TPU's blockwise kernel, which keeps scores and mask to itself."""
  del key_segment_ids  # the queries' own

  def local(query, key, value, segment_ids):
    T, H = query.shape[1:3]
    kernel = _splash_kernel(T, H, keys, interpret)

    def row(query, key, value, ids):
      ids = None if ids is None else splash_attention.SegmentIds(ids, ids)
      return kernel(query, key, value, segment_ids=ids)

    heads_first = (x.swapaxes(1, 2) for x in (keys.scaled(query), key, value))
    return jax.vmap(row)(*heads_first, segment_ids).swapaxes(1, 2)

  return _on_each_device(local, query, key, value, segment_ids)


def _splash_kernel(T, H, keys, interpret):
  one = splash_attention.FullMask((T, T))
  if keys.window:
    window = (keys.window - 1, 0)
    one = splash_attention.LocalMask((T, T), window, offset=0)
  elif keys.causal:
    one = splash_attention.CausalMask((T, T))
  side = next(block for block in _BLOCKS if T % block == 0)
  return splash_attention.make_splash_mha(
    mask=splash_attention.MultiHeadMask([one] * H),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash_attention.BlockSizes(
      block_q=side,
      block_kv=side,
      block_q_dkv=side,
      block_kv_dkv=side,
      block_q_dq=side,
      block_kv_dq=side,
    ),
    interpret=interpret,
  )


def _on_each_device(f, query, key, value, segment_ids):
  """f on every device's own rows and heads: no compiler can split a kernel.

  What does not divide by its mesh axes is computed whole on each.
  """
  size = spread(query)
  if not size:
    return f(query, key, value, segment_ids)
  *rows, heads = MESH_AXES
  rows = tuple(name for name in rows if name in size)
  if query.shape[0] % math.prod(size[name] for name in rows):
    rows = ()
  if heads not in size or key.shape[2] % size[heads]:
    heads = None
  heads_spec = PartitionSpec(rows or None, None, heads, None)
  return jax.shard_map(
    f,
    mesh=jax.typeof(query).sharding.mesh,
    in_specs=(*[heads_spec] * 3, PartitionSpec(rows or None, None)),
    out_specs=heads_spec,
    check_vma=False,
  )(query, key, value, segment_ids)
