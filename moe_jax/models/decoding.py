"""The layout in which a stack decodes, which changes no number.

In training parameters are stacked for one loop over layers, each a slice. A
decoding step reads all of them for each token, and XLA's CPU compiler would
copy each slice first (`kernels/cpu.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.kernels import cpu
from moe_jax.layers.experts import Dropless, few_tokens
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models.base import check_decodes
from moe_jax.models.layer_trees import unstack
from moe_jax.models.stack import StackConfig
from moe_jax.routing.capacity import All


class DecodingStack(NamedTuple):
  """A stack that decodes, and its variables.

  Attributes:
    stack: The layout of the stack.
    params: The parameters of the stack.
    router_state: The state of its routers; {} where they have none.
  """

  stack: StackConfig
  params: dict[str, Any]
  router_state: dict[str, Any]


def stack_for_decoding(
  stack: StackConfig,
  params: Mapping[str, Any],
  router_state: Mapping[str, Any],
  *,
  few_rows: int,
  window: int,
) -> DecodingStack:
  """A stack with arrays of its own for every layer.

  A router whose draws depend on the shape of its input draws other experts step
  by step than for whole rows.

  Args:
    stack: The stack as trained or imported.
    params: The stack's parameters, unboxed.
    router_state: The state of the stack's routers.
    few_rows: The number of rows that take a step together, if experts are to be
      laid out for steps of few tokens; 0: they are not.
    window: See `Model.for_decoding`.

  Raises:
    ValueError: The stack is causal, and its experts choose tokens.
  """
  block = stack.block
  # Prompts can have any length, which not every implementation supports.
  attention = dataclasses.replace(block.attention, implementation='auto')
  if window and block.causal:
    windows = tuple(min(window, w or window) for w in stack.layer_windows)
    stack = dataclasses.replace(stack, windows=windows)
    window = min(window, attention.window or window)
    attention = dataclasses.replace(attention, window=window)
  block = dataclasses.replace(block, attention=attention)
  moe = stack.experts
  if moe is not None:
    if block.causal:
      check_decodes(moe)
    moe = serving_all(moe, causal=block.causal)
    block = dataclasses.replace(block, moe=moe)
  decoding = dataclasses.replace(stack, block=block, remat='none')
  decoding, params = unstack(decoding, params)
  _, router_state = unstack(stack, router_state)
  if (
    few_rows
    and moe is not None
    and moe.expert.format is None
    and isinstance(moe.dispatch, Dropless)
  ):
    decoding, params = _for_few_tokens(decoding, moe, params, few_rows)
  return DecodingStack(decoding, params, router_state)


def serving_all(moe: MoeOptions, causal: bool) -> MoeOptions:
  """The options of a sparse layer with room for all tokens.

  They stay as they are where the capacity is part of an imported checkpoint and
  can bind, and where experts choose tokens. No such checkpoint has groups of a
  number of tokens, into which a prompt need not divide.

  Args:
    moe: The options of the layer.
    causal: Whether the layer is run token by token.
  """
  single = causal and moe.group_size == 0
  if not moe.causality.room_in_generation:
    return moe
  if moe.group_size <= 0 and moe.capacity.keeps_in_generation(single):
    return moe
  dispatch = Dropless()
  if any(moe.expert.problems_with(dispatch)):
    dispatch = moe.dispatch
  return dataclasses.replace(
    moe, capacity=All(), dispatch=dispatch, group_size=0
  )


def _for_few_tokens(stack, moe, params, rows):
  K = moe.num_selected
  expert_counts = [
    layer.num_retained for layer in stack.moes if layer is not None
  ]
  distinct_rows = rows
  if 'task_ids' in moe.router.reads:  # all rows of a task choose alike
    distinct_rows = min(rows, stack.block.shared.num_tasks)
  if cpu.most_are_chosen(distinct_rows, K, max(expert_counts)):
    return _with_dispatch(stack, moe, few_tokens.Batched), params
  if sum(expert_counts) > cpu.MOST_UNROLLED:
    return stack, params
  stack = _with_dispatch(stack, moe, few_tokens.Unrolled)
  return stack, few_tokens.unrolled(params)


def _with_dispatch(stack, moe, dispatch_class):
  old_dispatch = moe.dispatch
  dispatch = dispatch_class(
    old_dispatch.backend, old_dispatch.exchange, old_dispatch.shadowing
  )
  moe = dataclasses.replace(moe, dispatch=dispatch)
  block = dataclasses.replace(stack.block, moe=moe)
  return dataclasses.replace(stack, block=block)
