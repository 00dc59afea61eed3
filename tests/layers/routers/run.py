"""Inputs for routers, and compiled routers to run on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax import All, Shared, TokenChoice
from moe_jax.layers.routers import Sizes
from tests.models import tiny

G, S, E, K, M = 3, 8, 5, 2, 6
IDS = np.random.default_rng(3).integers(0, 9, (G, S)).astype(np.uint32)


def draw(*shape, seed=0, dtype='float32'):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(jnp.dtype(dtype))


def some_mask():
  """A mask of a full group, one of three real tokens, and one of padding."""
  mask = np.ones((G, S), bool)
  mask[1, 3:] = mask[2] = False
  return mask


@functools.cache
def module(options, sizes):
  return options.module(sizes, Shared(num_tasks=9), 'router')


@functools.cache
def compiled(options, sizes, train):
  """A compiled router, shared by all tests."""

  @jax.jit
  def run(variables, x, mask, key, ids, layer):
    rngs = None if key is None else {'router': key}
    return module(options, sizes).apply(
      variables, x, mask, train, ids, layer, rngs=rngs
    )

  return run


def route(
  options=TokenChoice(),
  params=None,
  x=None,
  mask=None,
  *,
  num_experts=E,
  num_selected=1,
  capacity=All(),
  train=False,
  key=None,
  ids=IDS,
  layer=0,
  state=None,
):
  """Routes one input; returns (routing, aux)."""
  sizes = Sizes(num_experts, num_selected, capacity)
  x = draw(G, S, M) if x is None else x
  mask = np.ones(x.shape[:2], bool) if mask is None else mask
  key = None if key is None else tiny.key(key)
  variables = {'params': params} if params else {}
  if state is not None:
    variables['router_state'] = state
  ids = None if ids is None else jnp.asarray(ids)
  return compiled(options, sizes, train)(
    variables, x, mask, key, ids, jnp.int32(layer)
  )


def start(options, sizes, x=None, mask=None):
  """Initial variables of a router, without boxes."""
  x = draw(G, S, M) if x is None else x
  mask = np.ones(x.shape[:2], bool) if mask is None else mask
  x, mask = jnp.asarray(x), jnp.asarray(mask)
  ids = jnp.zeros(mask.shape, jnp.uint32)
  fresh = jax.jit(
    lambda key: module(options, sizes).init(key, x, mask, router_ids=ids)
  )(tiny.key(0))
  return nn.meta.unbox({k: v for k, v in fresh.items() if k != 'intermediates'})
