"""Multi-head and grouped-query self-attention.

Not here: scores, softmax and their fused forms (`dot_product.py`), positions
(`positions.py`).
"""

import dataclasses

from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.layers import dot_product
from moe_jax.layers.initializers import Init, zeros
from moe_jax.layers.matmul import rows_matmul
from moe_jax.layers.positions import rotate
from moe_jax.shapes import Array, Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Self-attention.

  Attributes:
    num_heads: H.
    head_width: D, on its own: H * D need not be M.
    num_kv_heads: Heads of keys and values, a divisor of H; each serves H /
      num_kv_heads query heads (arXiv:2305.13245).
    use_bias: Whether the four products add a bias.
    rotary: Whether queries and keys are rotated by position
      (arXiv:2104.09864).
    rope_theta: The base of the rotary wavelengths.
    dropout: Rate on the attention weights, in training; 'einsum' alone has it.
    causal: Whether a token sees those up to itself, or its whole segment.
    implementation: 'einsum' (any option; the scores are an array); 'xla'
      (`jax.nn.dot_product_attention`); 'cudnn' (the same on NVIDIA's kernels,
      in half precision; packed rows cost it a [B, 1, T, T] mask);
      'splash' (a TPU kernel, emulated and slow elsewhere);
      or 'auto': splash on a TPU and cudnn on a GPU where they can serve the
      options, else einsum.
    dtype: Of the products and the output; the softmax is float32.
    param_dtype: Of the stored parameters.
    init: How kernels start.
  """

  num_heads: int
  head_width: int
  num_kv_heads: int
  use_bias: bool = False
  rotary: bool = False
  rope_theta: float = 10_000.0
  dropout: float = 0.0
  causal: bool = True
  implementation: str = 'auto'
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  init: Init = Init()

  def __post_init__(self):
    if self.num_heads < 1 or self.head_width < 1:
      raise ValueError(
        f'num_heads={self.num_heads} and head_width={self.head_width} '
        'must be at least 1'
      )
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_kv_heads={self.num_kv_heads} does not divide '
        f'num_heads={self.num_heads}'
      )
    if self.rotary and self.head_width % 2:
      raise ValueError(f'rotary needs an even head_width={self.head_width}')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} not in [0, 1)')
    known = dot_product.IMPLEMENTATIONS
    if self.implementation not in known:
      raise unknown('attention', self.implementation, known)
    dot_product.check(
      self.implementation,
      dtype=self.dtype,
      head_width=self.head_width,
      dropout=self.dropout > 0,
    )


class Attention(nn.Module):
  """Scaled dot-product self-attention within segments."""

  config: AttentionConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    segment_ids: Int[Array, 'B T'] | None,
    positions: Int[Array, 'B T'],
    bias: Float32[Array, 'H T T'] | None = None,
    train: bool = False,
  ) -> Float[Array, 'B T M']:
    """Attends to tokens of the same segment, if causal up to oneself.

    Padding (segment 0) sees padding alone and no other token sees it.

    Args:
      x: Token representations.
      segment_ids: Of each token in its row; None: each row is one segment.
      positions: Of each token in its document, for rotary positions.
      bias: Added to the scaled scores (relative positions).
      train: Turns on dropout.

    Raises:
      ValueError: The config's implementation cannot serve the length, the
        bias or this machine.
    """
    c = self.config
    B, T, M = x.shape
    H, D = c.num_heads, c.head_width
    x = x.astype(c.dtype)
    query = self._project(x, 'query', H)  # [B, T, H, D]
    key = self._project(x, 'key', c.num_kv_heads)
    value = self._project(x, 'value', c.num_kv_heads)
    if c.rotary:
      query = rotate(query, positions, c.rope_theta)
      key = rotate(key, positions, c.rope_theta)
    y = self._attend(query, key, value, segment_ids, bias, train)
    axes = ('heads', 'kv', 'embed')
    init = c.init.kernel(axes, in_axis=(0, 1), out_axis=2, residual=True)
    w_out = self.param('w_out', init, (H, D, M), c.param_dtype)
    y = rows_matmul(y.reshape(B * T, H * D), w_out.reshape(H * D, M))
    if c.use_bias:
      b = self.param('b_out', zeros(('embed',)), (M,), c.param_dtype)
      y = y + b.astype(c.dtype)[None]
    return y.reshape(B, T, M)

  def _project(self, x, name, heads):
    c = self.config
    axes = ('embed', 'heads' if name == 'query' else 'kv_heads', 'kv')
    shape = (x.shape[-1], heads, c.head_width)
    init = c.init.kernel(axes, in_axis=0, out_axis=(1, 2))
    w = self.param(f'w_{name}', init, shape, c.param_dtype)
    B, T, M = x.shape
    # One contracted dimension in value and gradient; see FeedForward.
    y = rows_matmul(x.reshape(B * T, M), w.reshape(M, -1))
    y = y.reshape(B, T, *shape[1:])
    if c.use_bias:
      b = self.param(f'b_{name}', zeros(axes[1:]), shape[1:], c.param_dtype)
      y = y + b.astype(c.dtype)[None, None]
    return y

  def _attend(self, query, key, value, segment_ids, bias, train):
    c = self.config
    implementation = c.implementation
    if self.is_initializing():
      # Its numbers go nowhere, and its arrays are on no mesh. What is wrong
      # with the config is said here too, before anything compiles.
      dot_product.check(
        implementation,
        dtype=c.dtype,
        head_width=c.head_width,
        seq_len=query.shape[1],
        biased=bias is not None,
      )
      implementation = 'einsum'
    dropout = None
    if train and c.dropout:
      dropout = nn.Dropout(c.dropout, deterministic=False)
    return dot_product.attend(
      query,
      key,
      value,
      segment_ids,
      implementation=implementation,
      causal=c.causal,
      bias=bias,
      dropout=dropout,
    )
