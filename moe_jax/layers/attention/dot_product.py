"""Scaled dot-product attention within segments, fused if the platform can."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.kernels.cpu import add_to_each
from moe_jax.layers.attention.blockwise import blocks
from moe_jax.layers.attention.keys import Keys, masked_softmax, visible
from moe_jax.layers.attention.splash import LEAST_BLOCK, splash
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float, Float32, Int

IMPLEMENTATIONS = ('auto', 'blocks', 'cudnn', 'einsum', 'splash', 'xla')
HALF = ('bfloat16', 'float16')


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
    key_segment_ids: The segment of each key; None: those of the queries, or
      one for each row of another sequence.
    keys: The rules for which of the segment's keys a token sees.
    implementation: One of `IMPLEMENTATIONS`; see `AttentionOptions`.
    bias: The bias that is added to the scaled scores.
    sinks: The logit of each head that stands beside the scores in the
      denominator of the softmax, and weighs nothing.
    dropout: A function that drops some of the weights.

  Raises:
    ValueError: The implementation cannot serve the options or this machine.
  """
  options = dict(
    dtype=str(query.dtype),
    head_width=max(query.shape[3], value.shape[3]),
    seq_len=query.shape[1],
    biased=bias is not None,
    sinks=sinks is not None,
    dropout=dropout is not None,
    cross=keys.cross or key_segment_ids is not None,
  )
  if key_segment_ids is None and not keys.cross:
    key_segment_ids = segment_ids
  plain_einsum = functools.partial(
    einsum, keys=keys, bias=bias, sinks=sinks, dropout=dropout
  )
  candidates = {
    'einsum': plain_einsum,
    'blocks': functools.partial(blocks, keys=keys, bias=bias, sinks=sinks),
    'library': functools.partial(_of_one_width, jax_nn, keys=keys, bias=bias),
    'splash': functools.partial(_of_one_width, splash, keys=keys, sinks=sinks),
  }
  f = _choose(implementation, options, candidates)
  return f(query, key, value, segment_ids, key_segment_ids)


def _of_one_width(f, query, key, value, *ids, keys, **options):
  """f, which needs values as wide as keys, with zeros where they are not."""
  scored, width = key.shape[3], value.shape[3]
  if scored == width:
    return f(query, key, value, *ids, keys=keys, **options)
  keys = keys._replace(scale=keys.scale or scored**-0.5)

  def widened(x):
    padding = max(scored, width) - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding)))

  y = f(*map(widened, (query, key, value)), *ids, keys=keys, **options)
  return y[..., :width]


def _choose(name, options, candidates):
  check(name, **options)
  if name == 'cudnn' and not _cuda_capability():
    raise InputError(
      f"attention='cudnn' needs an NVIDIA GPU, not {jax.default_backend()!r}"
    )
  if name == 'auto' and _cudnn_serves(options):
    name = 'cudnn'
  if name in ('cudnn', 'xla'):
    return functools.partial(candidates['library'], implementation=name)
  kernel = candidates['splash']
  if name == 'splash':
    emulated = functools.partial(kernel, interpret=True)
    return _by_platform(emulated, tpu=kernel)
  if name != 'auto':
    return candidates[name]
  preferred = {'cpu': 'blocks', 'tpu': 'splash'}
  by_platform = {
    platform: candidates[name]
    for platform, name in preferred.items()
    if not misfit(name, **options)
  }
  plain = candidates['einsum']
  return _by_platform(plain, **by_platform) if by_platform else plain


def misfit(
  name: str,
  *,
  dtype: str,
  head_width: int,
  seq_len: int = 0,
  biased: bool = False,
  sinks: bool = False,
  dropout: bool = False,
  cross: bool = False,
) -> str:
  """The reason why an implementation cannot serve these options; '' if it can.

  With seq_len=0 lengths are not checked.
  """
  D, T = head_width, seq_len
  no_dropout = (dropout, 'it has no dropout')
  no_bias = (biased, 'it has no relative positions')
  no_sinks = (sinks, 'it has no attention sinks')
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
      (T % LEAST_BLOCK, f'seq_len={T} is no multiple of {LEAST_BLOCK}'),
      (cross, 'it has no keys of another sequence'),
      no_bias,
      no_dropout,
    ),
    'xla': (no_dropout, no_sinks),
  }
  return next((reason for unmet, reason in rules.get(name, ()) if unmet), '')


def check(name: str, **options) -> None:
  """Raises ValueError where `misfit` has a reason."""
  if reason := misfit(name, **options):
    raise InputError(f"attention={name!r}: {reason}; 'auto' serves it")


def _cudnn_serves(options) -> bool:
  # Tracing cuDNN's attention needs NVIDIA's library, so here the machine
  # decides, not the platform that the program is lowered for.
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


def _by_platform(default, **by_platform):
  return functools.partial(
    jax.lax.platform_dependent, default=default, **by_platform
  )


def einsum(
  query,
  key,
  value,
  segment_ids,
  key_segment_ids,
  *,
  keys,
  bias,
  sinks=None,
  dropout=None,
):
  """Attention by two products and a softmax, which supports every option."""
  B, T, H, D = query.shape
  S, N = key.shape[1:3]
  query = keys.scaled(query.reshape(B, T, N, H // N, D))
  scores = jnp.einsum(
    'BTNJD,BSND->BNJTS', query, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    scores = add_to_each(scores, bias.reshape(N, H // N, T, S))
  mask = visible(segment_ids, key_segment_ids, (T, S), keys)[:, None, None]
  if sinks is not None:
    sinks = sinks.reshape(1, N, H // N, 1, 1)
  weights = masked_softmax(scores, mask, sinks).astype(value.dtype)
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
  """`attend` to a cache [B, N, S, D]; the first query is at slot `start`.

  A causal query sees no slots behind its own, filled or not. With
  `slot_numbers`, key s is that of slot slot_numbers[s], and the bias has all
  slots.
  """
  B, T, H, D = query.shape
  (N, S), U = key.shape[1:3], value.shape[3]
  query = keys.scaled(query).reshape(B, T, N, H // N, D)
  query = query.transpose(0, 2, 3, 1, 4).reshape(B, N, H // N * T, D)
  scores = jnp.einsum(
    'BNRD,BNSD->BNRS', query, key, preferred_element_type=jnp.float32
  )
  scores = scores.reshape(B, N, H // N, T, S)
  if bias is not None:
    if slot_numbers is not None:
      bias = jnp.take(bias, jnp.maximum(slot_numbers, 0), axis=2)
    scores = scores + bias.reshape(1, N, H // N, T, S)
  mask = visible(
    segment_ids, key_segment_ids, (T, S), keys, start, slot_numbers
  )
  if sinks is not None:
    sinks = sinks.reshape(1, N, H // N, 1, 1)
  weights = masked_softmax(scores, mask[:, None, None], sinks)
  weights = weights.astype(value.dtype)
  weights = weights.reshape(B, N, H // N * T, S)
  y = jnp.einsum('BNRS,BNSU->BNRU', weights, value)
  y = y.reshape(B, N, H // N, T, U).transpose(0, 3, 1, 2, 4)
  return y.reshape(B, T, H, U)


def jax_nn(
  query, key, value, segment_ids, key_segment_ids, *, keys, bias, implementation
):
  """JAX's own attention; rows of several segments need a mask in memory."""
  mask = None
  if segment_ids is not None:
    lengths = query.shape[1], key.shape[1]
    all_keys = Keys(causal=False)
    mask = visible(segment_ids, key_segment_ids, lengths, all_keys)[:, None]
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
