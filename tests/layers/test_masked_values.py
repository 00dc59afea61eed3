"""NaN or infinity in padding reaches no output, loss or gradient.

Each function is called with zeros at padding, and then with something worse.
All that it returns for real tokens has to be the same, bit for bit, and so
have all gradients. Routers alone are in `routers/test_contract.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import moe_jax
from moe_jax import models, routing
from moe_jax.layers import Attention, AttentionOptions, Lstm, LstmOptions
from moe_jax.routing.dispatch import einsum, gather, sorted_rows
from tests.models import tiny

B, T, M, E, K = 2, 6, 8, 4, 2
# The last two tokens of the first row are padding, and one in the second.
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]], bool)
WORSE = (np.nan, np.inf, -np.inf)


def tokens(at_padding, width=M):
  x = np.random.default_rng(0).normal(size=(B, T, width)).astype(np.float32)
  return jnp.asarray(np.where(MASK[..., None], x, np.float32(at_padding)))


def real(y):
  """The outputs of real tokens, without those of padding, which may be NaN."""
  return jnp.where(MASK[..., None], y, 0)


def assert_same(f, *, worse=(np.nan,)):
  """Checks that f(x) is finite, and equal for zeros and `worse` at padding."""
  expected = jax.tree.leaves(f(tokens(0.0)))
  for value in worse:
    other = jax.tree.leaves(f(tokens(value)))
    for a, b in zip(expected, other, strict=True):
      assert np.isfinite(b).all()
      np.testing.assert_array_equal(a, b)


def values_and_gradients(layer, call):
  """Function of x: what `call` returns, and gradients of params and real x."""
  params = jax.jit(lambda key, x: layer.init(key, x, **call))(
    tiny.key(0), tokens(0.0)
  )

  def loss(params, x):
    result = layer.apply(params, x, **call)
    y, extra = result if isinstance(result, tuple) else (result, ())
    aux = sum(leaf.sum() for leaf in jax.tree.leaves(extra))
    return (real(y) ** 2).sum() + aux, (real(y), extra)

  @jax.jit
  def run(x):
    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (d_params, dx), values = grad(params, x)
    return d_params, real(dx), values

  return run


def moe(router, dispatch, **options):
  return moe_jax.MoE(
    moe_jax.MoeOptions(
      num_experts=E,
      num_selected=K,
      router=router,
      capacity=moe_jax.All(),
      dispatch=dispatch,
      expert=moe_jax.FeedForwardExpert(hidden=5),
      **options,
    ),
  )


# `test_moving_tokens` covers how the other dispatchers move tokens.
@pytest.mark.parametrize(
  'dispatch',
  [moe_jax.Gather(), pytest.param(moe_jax.Dropless(), marks=pytest.mark.slow)],
)
def test_every_dispatch(dispatch):
  # A shared expert takes tokens past the router, which has no say in them.
  shared = moe_jax.SharedExpertOptions(hidden=3)
  layer = moe(moe_jax.TokenChoice(), dispatch, shared_expert=shared)
  assert_same(
    values_and_gradients(layer, {'token_mask': jnp.asarray(MASK)}), worse=WORSE
  )


@pytest.mark.parametrize('mover', [einsum, gather, sorted_rows])
def test_moving_tokens(mover):
  logits = tokens(0.0, E)

  def move(x):
    chosen = routing.token_choice(
      logits, num_selected=K, capacity=3, mask=jnp.asarray(MASK)
    )

    def round_trip(x):
      rows = mover.dispatch(x, chosen)
      return (rows**2).sum(), (rows, mover.combine(rows, chosen))

    dx, values = jax.grad(round_trip, has_aux=True)(x)
    return real(dx), values

  assert_same(jax.jit(move))


def test_self_attention():
  layer = Attention(AttentionOptions(num_heads=2), causal=False)
  call = {
    'segment_ids': jnp.asarray(MASK, jnp.int32),
    'positions': jnp.tile(jnp.arange(T), (B, 1)),
  }
  assert_same(values_and_gradients(layer, call), worse=WORSE)


@pytest.mark.slow
def test_an_lstm():
  layer = Lstm(LstmOptions(hidden=5))
  call = {'segment_ids': jnp.asarray(MASK, jnp.int32)}
  assert_same(values_and_gradients(layer, call))


@pytest.mark.slow
def test_a_model_whose_padding_embeds_to_nan():
  # A tied table would multiply every output by the NaN of padding's row.
  apart = models.EmbeddingOptions(tie=False)
  model = models.EncoderDecoderOptions(
    vocab_size=7,
    width=M,
    num_layers=1,
    embedding=apart,
    moe=moe_jax.MoeOptions(num_experts=E, layers='all'),
  ).build()
  params = nn.meta.unbox(models.init_params(model, jax.random.key(0)))
  ids = jnp.asarray(np.where(MASK, np.arange(B * T).reshape(B, T) % 6 + 1, 0))
  segments = jnp.asarray(MASK, jnp.int32)
  inputs = {}
  for prefix in model.stacks.sequences:
    inputs |= {f'{prefix}tokens': ids, f'{prefix}segment_ids': segments}
  batch = {'targets': ids, 'loss_weights': segments.astype(jnp.float32)}

  def loss(params, at_padding):
    table = params['embedding'].at[0].set(at_padding)
    outputs, aux = model.apply(
      {'params': {**params, 'embedding': table}}, **inputs
    )
    nats = model.loss(outputs, batch).nats * batch['loss_weights']
    return nats.sum() + aux.z_loss.sum()

  run = jax.jit(jax.value_and_grad(loss))
  for a, b in zip(
    jax.tree.leaves(run(params, 0.0)), jax.tree.leaves(run(params, jnp.nan))
  ):
    assert np.isfinite(b).all()
    np.testing.assert_array_equal(a, b)
