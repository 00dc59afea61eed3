"""A stack as it decodes, step by step: the same numbers, in another layout.

Stacked parameters are for training: one loop, one slice a layer. A decoding
step reads all of them once a token, and XLA's CPU compiler would copy each
slice first (`kernels/cpu.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.kernels import cpu
from moe_jax.layers.experts import few_tokens
from moe_jax.layers.experts.sorted_rows_experts import Dropless
from moe_jax.layers.moe import MoeOptions
from moe_jax.models.base import check_decodes
from moe_jax.models.layer_trees import unstack
from moe_jax.models.stack import StackConfig


class DecodingStack(NamedTuple):
  """A stack that decodes, and its variables.

  Attributes:
    stack: Its layout.
    params: Its parameters.
    router_state: What its routers keep; {} where they keep nothing.
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

  A router that draws by the shape of what it sees draws other experts step by
  step than for whole rows.

  Args:
    stack: As trained or imported.
    params: Its parameters, unboxed.
    router_state: What its routers keep.
    few_rows: Rows that take a step together, where experts are to be laid out
      for steps of few tokens; 0: they are not.
    window: See `Model.for_decoding`.

  Raises:
    ValueError: The stack is causal, and its experts choose among tokens.
  """
  block = stack.block
  # Lengths are whatever the prompts have; not every implementation takes them.
  attention = dataclasses.replace(block.attention, implementation='auto')
  if window and block.causal:
    window = min(window, attention.window or window)
    attention = dataclasses.replace(attention, window=window)
  block = dataclasses.replace(block, attention=attention)
  moe = stack.experts
  if moe is not None:
    if block.causal:
      check_decodes(moe)
    moe = serving_all(moe, causal=block.causal)
    block = dataclasses.replace(block, moe=moe)
  plain = dataclasses.replace(stack, block=block, remat='none')
  plain, params = unstack(plain, params)
  _, router_state = unstack(stack, router_state)
  if few_rows and moe is not None and isinstance(moe.dispatch, Dropless):
    plain, params = _for_few_tokens(plain, moe, params, few_rows)
  return DecodingStack(plain, params, router_state)


def serving_all(moe: MoeOptions, causal: bool) -> MoeOptions:
  """The layer with room for all tokens.

  It stays as it is where its capacity is part of an imported checkpoint and can
  bind, and where its experts choose.

  Args:
    moe: The layer.
    causal: Whether it is run token by token.
  """
  sizes = moe.router.serving_all(moe.sizes)
  single = causal and moe.group_size == 0
  if sizes is None or moe.capacity.keeps_in_generation(single):
    return moe
  dispatch = Dropless()
  if any(moe.expert.problems_with(dispatch)):
    dispatch = moe.dispatch
  return dataclasses.replace(
    moe, capacity=sizes.capacity, dispatch=dispatch, group_size=0
  )


def _for_few_tokens(stack, moe, params, rows):
  E, K = moe.num_experts, moe.num_selected
  if cpu.most_are_chosen(rows, K, E):
    return _with_dispatch(stack, moe, few_tokens.Batched), params
  if sum(stack.sparse) * E > cpu.MOST_UNROLLED:
    return stack, params
  stack = _with_dispatch(stack, moe, few_tokens.Unrolled)
  return stack, few_tokens.unrolled(params)


def _with_dispatch(stack, moe, dispatch):
  # Backend and exchange stay as they are.
  dispatch = dispatch(moe.dispatch.backend, moe.dispatch.exchange_dtype)
  moe = dataclasses.replace(moe, dispatch=dispatch)
  block = dataclasses.replace(stack.block, moe=moe)
  return dataclasses.replace(stack, block=block)
