"""Inputs for routers, and compiled routers to run on them."""

import functools

import jax
import numpy as np
from flax import linen as nn

from moe_jax import All, Shared, TokenChoice
from moe_jax.layers.routers import Sizes, TokenInfo
from tests.models import tiny
from tests.models.tiny import draw

G, S, E, K, M = 3, 8, 5, 2, 6
IDS = np.random.default_rng(3).integers(0, 9, (G, S)).astype(np.int32)


def some_mask():
  """A mask of a full group, one of three real tokens, and one of padding."""
  mask = np.ones((G, S), bool)
  mask[1, 3:] = mask[2] = False
  return mask


def info_of(ids):
  """The same numbers for all that a router may read; nothing for None."""
  return TokenInfo() if ids is None else TokenInfo(ids, ids, ids, ids, ids)


@functools.cache
def module(options, sizes, num_tasks=9):
  return options.module(sizes, Shared(num_tasks=num_tasks), 'router')


@functools.cache
def compiled(options, sizes, train, num_tasks=9):
  """A compiled router, shared by all tests."""

  @jax.jit
  def run(variables, x, mask, key, ids, layer):
    rngs = None if key is None else {'router': key}
    return module(options, sizes, num_tasks).apply(
      variables, x, mask, train, info_of(ids), layer, rngs=rngs
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
  return compiled(options, sizes, train)(
    variables, x, mask, key, ids, np.int32(layer)
  )


@functools.cache
def _initial(options, sizes):
  @jax.jit
  def init(key, x, mask, ids):
    fresh = module(options, sizes).init(key, x, mask, token_info=info_of(ids))
    # XLA removes all routing if nothing that routing returns is used.
    return {k: v for k, v in fresh.items() if k != 'intermediates'}

  return init


def start(options, sizes, x=None, mask=None):
  """Initial variables of a router, without boxes."""
  x = draw(G, S, M) if x is None else x
  mask = np.ones(x.shape[:2], bool) if mask is None else mask
  ids = np.zeros(mask.shape, np.int32)
  return nn.meta.unbox(_initial(options, sizes)(tiny.key(0), x, mask, ids))
