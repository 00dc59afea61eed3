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
from moe_jax.layers import Dropless, SharedExpertOptions
from moe_jax.layers.positions import NoPositions
from moe_jax.routing.capacity import All
from moe_jax.routing.dispatch import einsum, gather, sorted_rows
from tests.models import tiny

B, T, M, E, K = 2, 6, 8, 4, 2
# The last two tokens of the first row are padding, and one in the second.
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]], bool)


def tokens(at_padding, width=M):
  x = np.random.default_rng(0).normal(size=(B, T, width)).astype(np.float32)
  return jnp.asarray(np.where(MASK[..., None], x, np.float32(at_padding)))


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


LAYERS = dict(layers='1', num_experts=E, shared_expert=SharedExpertOptions(3))


# A shared expert takes tokens past the router, which has no say in them.
@pytest.mark.parametrize(
  ('kind', 'moe', 'options'),
  [
    ('encoder_decoder', LAYERS, {}),
    pytest.param(
      'lstm',
      LAYERS | dict(dispatch=Dropless(), capacity=All()),
      dict(positions=NoPositions()),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_model_whose_padding_embeds_to_nan(kind, moe, options):
  # A tied table would multiply every output by the NaN of padding's row.
  model = tiny.build(moe, kind, embedding=dict(tie=False), **options)
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

  assert_same(functools.partial(loss, params), np.nan, np.inf, -np.inf)
