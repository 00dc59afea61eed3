"""A long short-term memory, optionally with a projection of its output.

The cells have width H and the output has the model's width M. Where the two
differ, a kernel projects the cells to the output, and the next step receives
the projected output (Sak et al. 2014, https://arxiv.org/abs/1402.1128). Flax's
cells have no projection, and multiply their input step by step; here one
product multiplies the inputs of all steps.
"""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from moe_jax.config import Options, option
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.shared import Shared
from moe_jax.routing.rows import without_nan
from moe_jax.shapes import Array, Float, Int, Leaf, checked

GATES = 4  # input, forget, new, output
_FORGET = 1
_ROLE = 'lstm'


@dataclasses.dataclass(frozen=True)
class LstmOptions(Options):
  """The options of an LSTM layer, whose input and output have the width M."""

  hidden: int = option(
    0,
    'Number H of cells of an LSTM layer; 0: model.width. With any other number '
    "a layer's output is projected onto the width of the model.",
    minimum=0,
  )
  forget_bias: float = option(
    1.0,
    "Initial bias of an LSTM's forget gate; above 0, cells remember at "
    'first, at 0 they forget half, and below 0 (a negative bias) more.',
  )
  unroll: int = option(
    1,
    'Number of steps that the loop of an LSTM over a row runs in one round; '
    'more make a larger program with fewer rounds.',
    minimum=1,
  )
  twin_depth: int = option(
    1,
    'Number of hidden layers of the dense feed-forward that replaces a '
    'mixture where moe.num_experts is 0: a single one has moe.num_selected '
    'times the width of an expert, each of several has the width of an expert.',
    minimum=1,
  )

  def cells(self, width: int) -> int:
    """The number H of cells in a model of width M = `width`."""
    return self.hidden or width

  def shrunk(self) -> Self:
    return dataclasses.replace(self, hidden=24 if self.hidden else 0)


class LstmState(NamedTuple):
  """The state that one step of an LSTM leaves to the next.

  Attributes:
    cell: float32 [B, H], the cells c.
    output: [B, M], the output h.
    segment: int [B], the document that the cells and the output belong to; 0
      before the first document.
  """

  cell: Leaf
  output: Leaf
  segment: Leaf


class Lstm(nn.Module):
  """i, f, g, o = x W_in + h W_state + b; c = f c + i g; h = (o tanh c) W_out.

  i, f and o pass a sigmoid and g a tanh. The input x and the output h have the
  width M, and the cells c have H = `options.cells(M)`; there is a W_out [H, M]
  only if H is not M. The product with W_state takes the h of the step before.

  Attributes:
    options: The options of the layer.
    shared: The settings that all layers of the model share. Cells are float32
      whatever the types of the model are.
  """

  options: LstmOptions
  shared: Shared = Shared()

  @nn.compact
  @checked
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    segment_ids: Int[Array, 'B T'] | None = None,
    state: LstmState | None = None,
  ) -> tuple[Float[Array, 'B T M'], LstmState]:
    """The output h of every step, and the state after the last.

    Args:
      x: The inputs of all steps.
      segment_ids: The document of each step in its row, from 1. A document
        begins with a state of zeros. Padding (0) leaves the state as it is and
        outputs the h of the step before. Default: one document.
      state: The state after all earlier steps; None: x has the first steps.
    """
    B, T, M = x.shape
    if segment_ids is None:
      segment_ids = jnp.ones((B, T), jnp.int32)
    else:
      x = without_nan(segment_ids > 0, x)
    w_in, w_state, bias, w_out = self._parameters(M)
    rows = x.astype(self.shared.dtype).reshape(B * T, M)
    inputs = (rows_matmul(rows, w_in) + bias[None]).reshape(B, T, -1)
    if state is None:
      state = start(self.options, self.shared, B, M, segment_ids.dtype)
    last, y = jax.lax.scan(
      functools.partial(_step, w_state, w_out),
      state,
      (inputs.swapaxes(0, 1), segment_ids.swapaxes(0, 1)),
      unroll=min(self.options.unroll, T),
    )
    return y.swapaxes(0, 1), last

  def _parameters(self, M):
    """Makes w_in and w_state [M, 4 H], the bias [4 H], and w_out [H, M].

    H is the number of cells; w_out is None if it is M.
    """
    shared, H = self.shared, self.options.cells(M)
    dtype, param_dtype = shared.dtype, shared.param_dtype
    axes, shape = ('embed', None, 'mlp'), (M, GATES, H)
    init = parameters.kernel(
      shared, axes, role=_ROLE, in_axis=0, out_axis=(1, 2)
    )
    w_in = self.param('w_in', init, shape, param_dtype).reshape(M, -1)
    w_state = self.param('w_state', init, shape, param_dtype).reshape(M, -1)

    def forget_bias(_, shape, dtype):
      bias = jnp.zeros(shape, dtype)
      return bias.at[_FORGET].set(self.options.forget_bias)

    init = parameters.boxed(forget_bias, axes[1:], role=_ROLE, form='bias')
    bias = self.param('b_gates', init, shape[1:], param_dtype)
    w_out = None
    if H != M:
      init = parameters.kernel(shared, ('mlp', 'embed'), role=_ROLE)
      w_out = self.param('w_out', init, (H, M), param_dtype).astype(dtype)
    return (w_in, w_state.astype(dtype), bias.reshape(-1).astype(dtype), w_out)


def start(
  options: LstmOptions,
  shared: Shared,
  batch_size: int,
  width: int,
  id_dtype: DTypeLike = jnp.int32,
) -> LstmState:
  """The state, zeros, before the first step of B = `batch_size` sequences.

  M is `width`. The indices of documents in the state have the type `id_dtype`.
  """
  return LstmState(
    cell=jnp.zeros((batch_size, options.cells(width)), jnp.float32),
    output=jnp.zeros((batch_size, width), shared.dtype),
    segment=jnp.zeros(batch_size, id_dtype),
  )


def _step(w_state, w_out, state, inputs):
  """One step of B sequences: the `LstmState` after it, and its output [B, M].

  Args:
    w_state: The kernel [M, 4 H] that multiplies the output of the step before.
    w_out: The kernel [H, M] of the output; None if H is M.
    state: The state after the step before.
    inputs: The step's inputs times w_in with the bias, [B, 4 H] for H cells,
      and documents, int [B]; where they are 0, padding, the state stays as is.
  """
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
