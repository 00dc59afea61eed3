"""A model as it decodes, step by step: the same numbers, in another layout.

Stacked parameters are for training: one loop, one slice a layer. A decoding
step reads all of them once a token, and would copy each slice first.
"""

import dataclasses
from typing import Any

import jax

from moe_jax.layers.experts import few_tokens
from moe_jax.layers.moe import MoeConfig
from moe_jax.models.build import Model
from moe_jax.models.causality import check_decodes, check_generates
from moe_jax.models.lstm_lm import LstmLm
from moe_jax.models.stack import StackConfig, unstack
from moe_jax.routing import CapacityRule

# Rules that say how many tokens an expert takes whatever their number: part of
# what an imported checkpoint computes, not a bound on training's buffers.
OWN_RULES = ('fixed', 'fraction')
# Experts with arrays of their own, over all layers: each is a branch of the
# program.
MOST_UNROLLED = 512


def for_decoding(
  model: Model,
  params: dict[str, Any],
  *,
  batch_size: int = 1,
  platform: str = '',
) -> tuple[Model, dict[str, Any]]:
  """The model that decodes, and its parameters, which are copies.

  Nothing is dropped, unless a stack's capacity rule is one of `OWN_RULES`;
  where an encoder's experts choose, they do as in training. Layers have arrays
  of their own; on a CPU, so have a stack's experts, where they are few and a
  step chooses few of them; see `layers/experts/few_tokens.py`. Parameters of an
  LSTM language model stay as they are. A router 'random' draws by the shape of
  what it sees: step by step it draws other experts than of whole rows.

  Args:
    model: As trained or imported.
    params: Its parameters, unboxed.
    batch_size: Rows that take a step together: what is fast depends on them,
      and nothing else.
    platform: Where it decodes; '' is JAX's default backend.

  Raises:
    ValueError: Experts of the decoder choose among tokens.
  """
  if isinstance(model, LstmLm):
    check_generates(model)
    moe = model.config.moe and _serving_all(model.config.moe)
    config = dataclasses.replace(model.config, moe=moe)
    return model.clone(config=config), params
  on_cpu = (platform or jax.default_backend()) == 'cpu'
  config, params = model.config, dict(params)
  for path, stack in config.stacks:
    own = params
    for name in path:
      own = own[name]
    stack = dataclasses.replace(_dropless(stack), remat='none')
    stack, own = unstack(stack, own)
    if on_cpu:
      stack, own = _for_few_tokens(stack, own, batch_size)
    name = path[-1] if path else 'stack'
    config = dataclasses.replace(config, **{name: stack})
    if path:
      params[name] = own
    else:
      params = own
  return model.clone(config=config), params


def unstacked(model: Model, router_state: dict[str, Any]) -> dict[str, Any]:
  """The collection `router_state` of the model that decodes."""
  router_state = dict(router_state)
  for path, stack in model.config.stacks:
    if not path:
      return unstack(stack, router_state)[1]
    (name,) = path
    if name in router_state:
      router_state[name] = unstack(stack, router_state[name])[1]
  return router_state


def _dropless(stack: StackConfig) -> StackConfig:
  moe = stack.block.moe
  check_decodes(stack)
  if moe is None or moe.router.kind == 'expert_choice':
    return stack
  rule = moe.router.capacity.rule
  causal_alone = stack.block.attention.causal and moe.group_size == 0
  if rule in OWN_RULES and not (rule == 'fixed' and causal_alone):
    return stack
  # A decoder's step has one token a group: a fixed capacity cannot bind.
  return _with_moe(stack, _serving_all(moe))


def _serving_all(moe: MoeConfig) -> MoeConfig:
  router = dataclasses.replace(moe.router, capacity=CapacityRule('all'))
  return dataclasses.replace(
    moe, router=router, dispatch='dropless', group_size=0
  )


def _for_few_tokens(stack, params, batch_size):
  moe = stack.block.moe
  if moe is None or moe.dispatch != 'dropless':
    return stack, params
  router = moe.router
  if few_tokens.most_are_chosen(
    batch_size, router.num_selected, router.num_experts
  ):
    return _with_moe(
      stack, dataclasses.replace(moe, decoding='batched')
    ), params
  if sum(stack.sparse) * router.num_experts > MOST_UNROLLED:
    return stack, params

  def walk(tree):
    if not isinstance(tree, dict):
      return tree
    return {
      name: few_tokens.unstack(leaf) if name == 'experts' else walk(leaf)
      for name, leaf in tree.items()
    }

  moe = dataclasses.replace(moe, decoding='unrolled')
  return _with_moe(stack, moe), walk(params)


def _with_moe(stack: StackConfig, moe: MoeConfig) -> StackConfig:
  block = dataclasses.replace(stack.block, moe=moe)
  return dataclasses.replace(stack, block=block)
