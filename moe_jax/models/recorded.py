"""Choices of experts that a model returns beside its outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from moe_jax.layers.moe import to_rows
from moe_jax.layers.routers.contract import CHOICES, LOGITS, SOWN, sown
from moe_jax.models.base import Model
from moe_jax.shapes import Array


class Recorded(NamedTuple):
  """The choices of one sparse layer, in rows of tokens.

  Attributes:
    expert: uint8 or uint16 [B, T, N], the number of the expert; the largest
      number of the type where there is no choice. N is K, or E where experts
      choose tokens.
    gate: float16 or float32 [B, T, N], the weight; 0 where it is not kept.
    kept: bool [B, T, N], whether the choice is served.
    logits: float16 or float32 [B, T, E], from which the router computes
      its losses; None where they are not asked for or the router has none.
  """

  expert: Array
  gate: Array
  kept: Array
  logits: Array | None


# The choices of each sparse layer, by its number; None where none are recorded.
Choices = dict[int, Recorded] | None
# (model, variables, arguments of `apply`) -> (its result, choices)
Apply = Callable[..., tuple[Any, Choices]]


def plainly(
  model: Model, variables: dict[str, Any], *args: Any, **arguments: Any
) -> tuple[Any, None]:
  """The result of `model.apply`, and no choices."""
  return model.apply(variables, *args, **arguments), None


def recording(
  model: Model,
  variables: dict[str, Any],
  *args: Any,
  logits: bool = False,
  dtype: str = 'float16',
  **arguments: Any,
) -> tuple[Any, Choices]:
  """The result of `model.apply`, and the choices of each layer that made some.

  Args:
    model: The model.
    variables: The variables of the model.
    *args: Further arguments of `model.apply`.
    logits: Whether the routers' logits are returned, too.
    dtype: The type of gates and logits.
    **arguments: Further arguments of `model.apply`, by name.
  """
  result, collections = model.apply(
    variables, *args, **arguments, mutable=[SOWN]
  )
  if SOWN not in collections:
    return result, {}
  layers = map(sown, model.layer_trees(collections[SOWN]))
  return result, {
    i: _recorded_choices(model, i, sown_values, logits, jnp.dtype(dtype))
    for i, sown_values in enumerate(layers)
    if CHOICES in sown_values
  }


def expert_type(num_experts: int) -> jnp.dtype:
  """The type of `Recorded.expert`, which has room for one number more."""
  return jnp.dtype(jnp.uint8 if num_experts < 256 else jnp.uint16)


def _recorded_choices(
  model: Model, layer: int, sown_values, logits: bool, dtype
) -> Recorded:
  choices, router_logits = sown_values[CHOICES], None
  index_type = expert_type(model.moe_of(layer).num_retained)
  no_expert = jnp.iinfo(index_type).max
  if logits and LOGITS in sown_values:
    router_logits = to_rows(sown_values[LOGITS], *choices.gate.shape[:2])
    largest = jnp.finfo(dtype).max  # so that no logit becomes infinite
    router_logits = jnp.clip(router_logits, -largest, largest).astype(dtype)
  return Recorded(
    expert=jnp.where(choices.expert < 0, no_expert, choices.expert).astype(
      index_type
    ),
    gate=choices.gate.astype(dtype),
    kept=choices.kept,
    logits=router_logits,
  )
