"""Dispatchers behind a router, in a small layer from logits to a loss."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import GATES, SLOT_PRIORITIES, token_choice
from tests.dispatch.movers import MOVERS, group_sizes

G, S, E, M = 2, 7, 5, 6
every_dispatcher = pytest.mark.parametrize('name', MOVERS)


def arrays(seed):
  """Random router logits [G, S, E]; tokens and the loss's weights [G, S, M]."""
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = ((G, S, E), (G, S, M), (G, S, M))
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def layer(name, logits, x, **options):
  """A layer that routes, dispatches to five unequal experts and combines."""
  routing = token_choice(logits, num_selected=2, **options)
  dispatcher = MOVERS[name]
  rows = dispatcher.dispatch(x, routing)
  scale = jnp.arange(1.0, E + 1)[:, None] / E
  sizes = group_sizes(name, routing)
  if sizes is None:
    scale = scale[:, None]
  else:
    scale = jnp.repeat(scale, sizes, 0, total_repeat_length=rows.shape[0])
  rows = jnp.tanh(rows * scale)
  return dispatcher.combine(rows, routing)


def layer_loss(name, gates, capacity, logits, x, w):
  return (w * layer(name, logits, x, gates=gates, capacity=capacity)).sum()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def layer_gradients(*args):
  return jax.value_and_grad(layer_loss, argnums=(3, 4))(*args)


@pytest.mark.as_users_compile
@pytest.mark.parametrize('gates', GATES)
def test_dispatchers_agree_from_logits_to_loss(gates):
  logits, x, w = arrays(8)
  expected = layer_gradients('einsum', gates, 2, logits, x, w)
  assert all(jnp.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(expected))
  for name in MOVERS:
    got = layer_gradients(name, gates, 2, logits, x, w)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      got,
      expected,
    )


@every_dispatcher
def test_a_token_that_lost_every_choice_has_no_nan_in_its_gradient(name):
  # All tokens choose the same two experts, which have one slot each.
  logits = jnp.tile(jnp.arange(E, dtype=jnp.float32), (G, S, 1))
  _, x, w = arrays(9)
  _, (d_logits, d_x) = layer_gradients(
    name, 'renormalized_after_drop', 1, logits, x, w
  )
  assert jnp.isfinite(d_logits).all() and jnp.isfinite(d_x).all()
  assert d_logits[:, 0].any() and d_x[:, 0].any()
  assert not d_logits[:, 1:].any() and not d_x[:, 1:].any()


def test_nor_on_the_way_to_it():
  # With `jax_debug_nans` on, no NaN may occur even in between.
  def gates(logits):
    return token_choice(
      logits, num_selected=2, capacity=1, gates='renormalized_after_drop'
    ).gate.max()

  with jax.debug_nans(True):
    jax.grad(gates)(jnp.zeros((G, S, E)))


@every_dispatcher
@pytest.mark.parametrize('slot_priority', SLOT_PRIORITIES)
def test_without_drops_the_order_of_tokens_does_not_matter(name, slot_priority):
  logits, x, _ = arrays(10)
  order = np.random.default_rng(0).permutation(S)
  options = dict(capacity=S, slot_priority=slot_priority)
  y = layer(name, logits, x, **options)
  shuffled = layer(name, logits[:, order], x[:, order], **options)
  np.testing.assert_allclose(y[:, order], shuffled, rtol=1e-5, atol=1e-6)
  assert (jnp.abs(y).max(-1) > 0).all()


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
