"""The slots and the multiplications of a router, read from its shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.layers import parameters
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.routers import Hierarchical, RouterOptions, Sizes, TokenInfo
from moe_jax.layers.routers.steps import AXES, ROLE
from moe_jax.layers.shared import Shared


def training_slots(moe: MoeOptions, group_size: int) -> int:
  """The slots of an expert in training, in a group of `group_size` tokens."""
  (routing, _), _ = _in_training(moe.router, moe.sizes, group_size, 1)
  return group_size if routing.capacity is None else routing.capacity


def router_multiply_adds(moe: MoeOptions, width: int) -> int:
  """The number of multiplications in the router's products for one token.

  This is the size of the router's kernels. The kernels of a hierarchical
  router's branches are stacked, and only the chosen branches' count.
  """
  _, variables = _in_training(moe.router, moe.sizes, 1, width)
  boxes = parameters.with_role(variables.get('params', {}), ROLE)
  total = 0
  for box in jax.tree.leaves(boxes, is_leaf=_is_box):
    size = box.value.size if box.form == 'kernel' else 0
    if isinstance(moe.router, Hierarchical) and box.names[0] != AXES[0]:
      size = size * moe.router.branches_selected // moe.router.branching
    total += size
  return total


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, parameters.Parameter)


@functools.lru_cache
def _in_training(
  router: RouterOptions, sizes: Sizes, group_size: int, width: int
) -> Any:
  """The shapes of a router's result and variables, for one group of tokens."""
  module = router.module(sizes, Shared(num_tasks=1), 'router')

  def run():
    key, ids = jax.random.key(0), jnp.zeros((1, group_size), jnp.int32)
    info = TokenInfo(ids, ids, ids, ids, ids).only(router.reads)
    x, mask = jnp.zeros((1, group_size, width)), jnp.ones(ids.shape, bool)
    rngs = {'params': key, 'router': key}
    return module.init_with_output(rngs, x, mask, True, info)

  return jax.eval_shape(run)
