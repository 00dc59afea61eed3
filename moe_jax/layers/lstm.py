"""A long short-term memory, with a projection of its output where asked for.

Cells of width H and an output of the model's width M: where the two differ, a
kernel projects one onto the other, and the next step receives what was
projected (Sak et al. 2014, https://arxiv.org/abs/1402.1128). Flax's cells have
no projection, and multiply their input step by step; here the inputs of all
steps are one product.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from moe_jax.layers.initializers import Init
from moe_jax.layers.rows_product import rows_matmul
from moe_jax.shapes import Array, Float, Int, Leaf

GATES = 4  # input, forget, new, output
_FORGET = 1


@dataclasses.dataclass(frozen=True)
class LstmConfig:
  """An LSTM layer M -> M.

  Attributes:
    hidden: H, cells; where it is not M, the output is projected.
    forget_bias: What the forget gate's bias starts at: above 0, cells remember
      at first.
    unroll: Steps in one round of the loop: fewer rounds, a larger program.
    dtype: Of the products and the output; cells are float32.
    param_dtype: Of the stored parameters.
    init: How kernels start.
  """

  hidden: int
  forget_bias: float = 1.0
  unroll: int = 1
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  init: Init = Init()

  def __post_init__(self):
    for name in ('hidden', 'unroll'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'lstm.{name}={getattr(self, name)} must be at least 1'
        )


class LstmState(NamedTuple):
  """What a step leaves to the next.

  Attributes:
    cell: float32 [B, H], c.
    output: [B, M], h.
    segment: int [B], the document that they are of; 0 where there was none.
  """

  cell: Leaf
  output: Leaf
  segment: Leaf


class Lstm(nn.Module):
  """i, f, g, o = x W_in + h W_state + b; c = f c + i g; h = (o tanh c) W_out.

  i, f, o are sigmoids and g a tanh of theirs; there is a W_out if H is not M.
  """

  config: LstmConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    segment_ids: Int[Array, 'B T'] | None = None,
    state: LstmState | None = None,
  ) -> tuple[Float[Array, 'B T M'], LstmState]:
    """h of every step, and what the last step leaves.

    Args:
      x: Inputs.
      segment_ids: The document of each step in its row, from 1. A document
        begins with zeros. Padding (0) changes nothing of what the steps before
        it left, and gives the h of the last of them. Default: one document.
      state: What the steps before these left; None: there were none.
    """
    c = self.config
    B, T, M = x.shape
    if segment_ids is None:
      segment_ids = jnp.ones((B, T), jnp.int32)
    w_in, w_state, bias, w_out = self._parameters(M)
    inputs = rows_matmul(x.astype(c.dtype).reshape(B * T, M), w_in)
    inputs = (inputs + bias[None]).reshape(B, T, -1)
    if state is None:
      state = start(c, B, M, segment_ids.dtype)
    state, y = jax.lax.scan(
      functools.partial(_step, w_state, w_out),
      state,
      (inputs.swapaxes(0, 1), segment_ids.swapaxes(0, 1)),
      unroll=min(c.unroll, T),
    )
    return y.swapaxes(0, 1), state

  def _parameters(self, M):
    """w_in and w_state [M, 4 * H], the bias, w_out [H, M] or None."""
    c, shape = self.config, (M, GATES, self.config.hidden)
    axes = ('embed', None, 'mlp')
    init = c.init.kernel(axes, in_axis=0, out_axis=(1, 2))
    w_in = self.param('w_in', init, shape, c.param_dtype)
    w_state = self.param('w_state', init, shape, c.param_dtype)

    def remember(key, shape, dtype):
      del key
      return jnp.zeros(shape, dtype).at[_FORGET].set(c.forget_bias)

    init = nn.with_logical_partitioning(remember, axes[1:])
    bias = self.param('b_gates', init, shape[1:], c.param_dtype)
    flat = (w.reshape(M, -1) for w in (w_in, w_state))
    w_out = None
    if c.hidden != M:
      init = c.init.kernel(('mlp', 'embed'))
      w_out = self.param('w_out', init, (c.hidden, M), c.param_dtype)
      w_out = w_out.astype(c.dtype)
    w_in, w_state = flat
    return (
      w_in,
      w_state.astype(c.dtype),
      bias.reshape(-1).astype(c.dtype),
      w_out,
    )


def start(
  c: LstmConfig, batch_size: int, width: int, id_dtype: DTypeLike = jnp.int32
) -> LstmState:
  """The state before the first step of `batch_size` rows of M = `width`."""
  return LstmState(
    cell=jnp.zeros((batch_size, c.hidden), jnp.float32),
    output=jnp.zeros((batch_size, width), c.dtype),
    segment=jnp.zeros(batch_size, id_dtype),
  )


def _step(w_state, w_out, state, inputs):
  """One step of all rows."""
  x, segment = inputs
  real = (segment > 0)[:, None]
  same = (segment == state.segment)[:, None]
  h = jnp.where(same, state.output, 0)
  cell = jnp.where(same, state.cell, 0)
  gates = (x + h @ w_state).astype(jnp.float32)
  i, f, g, o = jnp.split(gates, GATES, axis=-1)
  cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
  h = (jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(x.dtype)
  if w_out is not None:
    h = h @ w_out
  new = LstmState(cell, h, segment)
  state = jax.tree.map(
    lambda a, b: jnp.where(real if a.ndim > 1 else real[:, 0], a, b), new, state
  )
  return state, state.output
