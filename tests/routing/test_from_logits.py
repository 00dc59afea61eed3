"""Dispatchers behind a router, in a small layer from logits to a loss."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import token_choice
from tests.routing.movers import MOVERS, group_sizes

G, S, E, M = 2, 7, 5, 6
every_dispatcher = pytest.mark.parametrize('name', MOVERS)


def arrays(seed):
  """Random router logits [G, S, E]; tokens and the loss's weights [G, S, M]."""
  rng = np.random.default_rng(seed)
  shapes = ((G, S, E), (G, S, M), (G, S, M))
  return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in shapes]


def layer_loss(name, logits, x, w):
  """A layer that routes, dispatches to five unequal experts and combines."""
  routing = token_choice(
    logits, num_selected=2, gates='renormalized_after_drop', capacity=1
  )
  dispatcher = MOVERS[name]
  rows = dispatcher.dispatch(x, routing)
  scale = jnp.arange(1.0, E + 1)[:, None] / E
  sizes = group_sizes(name, routing)
  if sizes is None:
    scale = scale[:, None]
  else:
    scale = jnp.repeat(scale, sizes, 0, total_repeat_length=rows.shape[0])
  rows = jnp.tanh(rows * scale)
  return (w * dispatcher.combine(rows, routing)).sum()


@functools.partial(jax.jit, static_argnums=0)
def layer_gradients(*args):
  return jax.value_and_grad(layer_loss, argnums=(1, 2))(*args)


@pytest.mark.as_users_compile
def test_dispatchers_agree_from_logits_to_loss():
  logits, x, w = arrays(8)
  expected = layer_gradients('einsum', logits, x, w)
  assert all(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(expected))
  for name in MOVERS:
    gradients = layer_gradients(name, logits, x, w)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      gradients,
      expected,
    )


@every_dispatcher
def test_a_token_that_lost_every_choice_has_no_nan_in_its_gradient(name):
  # All tokens choose the same two experts, which have one slot each.
  logits = np.broadcast_to(np.arange(E, dtype=np.float32), (G, S, E))
  _, x, w = arrays(9)
  _, gradients = layer_gradients(name, jnp.asarray(logits), x, w)
  for gradient in map(np.asarray, gradients):
    assert np.isfinite(gradient).all()
    assert gradient[:, 0].any() and not gradient[:, 1:].any()


def test_nor_on_the_way_to_it():
  # With `jax_debug_nans` on, no NaN may occur even in between.
  def gates(logits):
    return token_choice(
      logits, num_selected=2, capacity=1, gates='renormalized_after_drop'
    ).gate.max()

  with jax.debug_nans(True):
    jax.grad(gates)(jnp.zeros((G, S, E)))


@pytest.mark.parametrize('name', ['gather', 'sorted_rows'])
def test_no_gradient_is_added_by_scatter(name):
  # A scatter-add of floats is slow on accelerators, and not reproducible on
  # some: no gradient may use one.
  logits, x, w = arrays(11)

  def gradients(logits, x, w):
    routing = token_choice(logits, num_selected=2, capacity=2)

    def loss(gate, x):
      chosen = dataclasses.replace(routing, gate=gate)
      mover = MOVERS[name]
      return (w * mover.combine(mover.dispatch(x, chosen), chosen)).sum()

    return jax.grad(loss, argnums=(0, 1))(routing.gate, x)

  program = str(jax.make_jaxpr(gradients)(logits, x, w))
  assert 'gather' in program and not re.search(
    r':f32\[[^=]*= scatter-add', program
  )
