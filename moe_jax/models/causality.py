"""Which models let an output see later tokens, and which cannot decode.

Not here: which slots do (`moe_jax.routing.is_causal`).
"""

from typing import Any

import ml_collections

from moe_jax.layers.moe import MoeConfig
from moe_jax.layers.routers.router_config import BY_EXPERT
from moe_jax.models.stack import StackConfig
from moe_jax.routing import is_causal


def leaks_future(moe: ml_collections.ConfigDict) -> bool:
  """Whether the routers of a `model.moe` section let outputs see later tokens.

  True where a decoder hands slots out so, or its experts choose, and capacity
  can bind. An encoder sees all of its tokens anyway.
  """
  causal = is_causal(
    slot_priority=moe.slot_priority,
    num_selected=moe.num_selected,
    capacity_rule=moe.capacity_rule,
    router=moe.router,
  )
  return moe.num_experts > 0 and moe.layers != 'none' and not causal


def check_causal(moe: ml_collections.ConfigDict) -> None:
  """Raises ValueError where a router leaks and the config does not say so."""
  if not leaks_future(moe) or moe.allow_future_leak:
    return
  if moe.router in BY_EXPERT:
    raise ValueError(
      f'router={moe.router!r} lets later tokens change earlier outputs, as an '
      'expert chooses among all tokens of a group; use another router, or set '
      'moe.allow_future_leak=True and report the run as one that leaks'
    )
  raise ValueError(
    f'slot_priority={moe.slot_priority!r} with num_selected='
    f'{moe.num_selected} lets later tokens change earlier outputs wherever '
    "capacity binds; use slot_priority='token_major', or set "
    'moe.allow_future_leak=True and report the run as one that leaks'
  )


def check_generates(model: Any) -> None:
  """Raises ValueError where a model cannot generate, token by token.

  Args:
    model: A `Decoder` or another.
  """
  if not hasattr(model, 'decode'):
    raise ValueError(
      f'{type(model).__name__} does not generate: its outputs are classes of '
      'examples, no text; evaluate it by its loss'
    )
  if not model.config.stacks:
    check_moe_decodes(model.config.moe)
  for _, stack in model.config.stacks:
    check_decodes(stack)


def check_decodes(c: StackConfig) -> None:
  """Raises ValueError where a stack cannot be run token by token.

  An encoder is never run so.
  """
  if c.block.attention.causal:
    check_moe_decodes(c.block.moe)


def check_moe_decodes(moe: MoeConfig | None) -> None:
  """Raises ValueError where a layer cannot be run token by token.

  Not where experts choose among tokens: of one there is nothing to choose, and
  every expert would take it. Those of 'strictly_balanced' choose in training
  alone; in inference a token is above an expert's threshold or not.
  """
  if moe is None or moe.router.kind != 'expert_choice':
    return
  if moe.router.capacity.rule != 'all':
    raise ValueError(
      "router='expert_choice' does not decode token by token: its experts "
      "choose among a group's tokens; evaluate the model by its loss, or train "
      'one with another router'
    )
