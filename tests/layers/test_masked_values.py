"""NaN or infinity in padding reaches no output, loss or gradient.

Functions and models are called with zeros at padding, and then with something
worse. All that they return for real tokens has to be the same, bit for bit, and
so have all gradients. Routers alone are in `routers/test_contract.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.layers import (
  Attention,
  AttentionOptions,
  Dropless,
  FeedForwardExpert,
  Gather,
  Lstm,
  LstmOptions,
  MoE,
  MoeOptions,
  SharedExpertOptions,
)
from moe_jax.routing.capacity import All
from moe_jax.routing.dispatch import einsum, gather, sorted_rows
from tests.models import tiny

B, T, M, E, K = 2, 6, 8, 4, 2
# The last two tokens of the first row are padding, and one in the second.
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]], bool)


WORSE = (np.nan, np.inf, -np.inf)


def tokens(at_padding, width=M):
  x = np.random.default_rng(0).normal(size=(B, T, width)).astype(np.float32)
  return jnp.where(MASK[..., None], x, at_padding)


def real(y):
  """The outputs of real tokens, without those of padding, which may be NaN."""
  return jnp.where(MASK[..., None], y, 0)


def assert_same(f, *worse):
  """Checks that f(x) is finite, and equal for x = 0 and something worse."""
  expected = jax.tree.leaves(f(0.0))
  for value in worse:
    for a, b in zip(expected, jax.tree.leaves(f(value)), strict=True):
      assert np.isfinite(b).all()
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('mover', [einsum, gather, sorted_rows])
def test_moving_tokens(mover):
  logits = tokens(0.0, E)

  @jax.jit
  def move(x):
    chosen = routing.token_choice(
      logits, num_selected=K, capacity=3, mask=jnp.asarray(MASK)
    )

    def round_trip(x):
      rows = mover.dispatch(x, chosen)
      return (rows**2).sum(), (rows, mover.combine(rows, chosen))

    dx, values = jax.grad(round_trip, has_aux=True)(x)
    return real(dx), values

  assert_same(lambda at_padding: move(tokens(at_padding)), np.nan)


def moe(dispatch):
  # A shared expert takes tokens past the router, which has no say in them.
  expert, shared = FeedForwardExpert(5), SharedExpertOptions(3)
  experts = dict(expert=expert, shared_expert=shared, capacity=All())
  return MoE(MoeOptions(E, K, dispatch=dispatch, **experts))


SEGMENTS = {'segment_ids': jnp.asarray(MASK, jnp.int32)}
POSITIONS = {'positions': jnp.tile(jnp.arange(T), (B, 1))}
LAYERS = {
  'gather': (moe(Gather()), {'token_mask': jnp.asarray(MASK)}),
  'dropless': (moe(Dropless()), {'token_mask': jnp.asarray(MASK)}),
  'attention': (
    Attention(AttentionOptions(2), causal=False), SEGMENTS | POSITIONS
  ),
  'lstm': (Lstm(LstmOptions(5)), SEGMENTS),
}  # fmt: skip


def marks(name):
  return pytest.mark.slow if name in ('dropless', 'lstm') else ()


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=marks(name)) for name in LAYERS]
)
def test_layers(name):
  layer, call = LAYERS[name]
  params = tiny.layer_params(layer, tokens(0.0), **call)

  def loss(params, x):
    result = layer.apply({'params': params}, x, **call)
    y, extra = result if isinstance(result, tuple) else (result, ())
    aux = sum(leaf.sum() for leaf in jax.tree.leaves(extra))
    return (real(y) ** 2).sum() + aux, (real(y), extra)

  @jax.jit
  def run(at_padding):
    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (d_params, dx), values = grad(params, tokens(at_padding))
    return d_params, real(dx), values

  assert_same(run, *WORSE)


@pytest.mark.slow
def test_a_model_whose_padding_embeds_to_nan():
  # A tied table would multiply every output by the NaN of padding's row.
  moe = dict(layers='1', num_experts=E)
  model = tiny.build(moe, 'encoder_decoder', embedding=dict(tie=False))
  params = tiny.params_of(model)
  ids = jnp.asarray(np.where(MASK, np.arange(B * T).reshape(B, T) % 6 + 1, 0))
  segments, inputs = jnp.asarray(MASK, jnp.int32), {}
  for prefix in model.stacks.sequences:
    inputs |= {f'{prefix}tokens': ids, f'{prefix}segment_ids': segments}
  batch = {'targets': ids, 'loss_weights': segments.astype(jnp.float32)}

  @jax.jit
  @jax.value_and_grad
  def loss(params, at_padding):
    table = params['embedding'].at[0].set(at_padding)
    outputs, aux = model.apply(
      {'params': {**params, 'embedding': table}}, **inputs
    )
    nats = model.loss(outputs, batch).nats * batch['loss_weights']
    return nats.sum() + aux.z_loss.sum()

  assert_same(functools.partial(loss, params), *WORSE)
