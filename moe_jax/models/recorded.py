"""Choices of experts that a model returns beside its outputs.

Not here: when they are copied from the devices and written
(`moe_jax/analysis/recording.py`).
"""

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
    logits: float16 or float32 [B, T, E], of which the router's losses are;
      None where they are not asked for or the router has none.
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
  model: Model, variables: dict[str, Any], *given: Any, **arguments: Any
) -> tuple[Any, None]:
  """The result of `model.apply`, and no choices."""
  return model.apply(variables, *given, **arguments), None


def recording(
  model: Model,
  variables: dict[str, Any],
  *given: Any,
  logits: bool = False,
  dtype: str = 'float16',
  **arguments: Any,
) -> tuple[Any, Choices]:
  """The result of `model.apply`, and the choices of each layer that made some.

  Args:
    model: The model.
    variables: Its variables.
    *given: Further arguments of `model.apply`.
    logits: Whether the routers' logits are returned, too.
    dtype: The type of gates and logits.
    **arguments: Further arguments of `model.apply`, by name.
  """
  result, kept = model.apply(variables, *given, **arguments, mutable=[SOWN])
  if SOWN not in kept:
    return result, {}
  layers = map(sown, model.layer_trees(kept[SOWN]))
  return result, {
    i: _recorded(model, i, found, logits, jnp.dtype(dtype))
    for i, found in enumerate(layers)
    if CHOICES in found
  }


def expert_type(num_experts: int) -> jnp.dtype:
  """The type of `Recorded.expert`, which has room for one number more."""
  return jnp.dtype(jnp.uint8 if num_experts < 256 else jnp.uint16)


def _recorded(model: Model, layer: int, found, logits: bool, dtype) -> Recorded:
  chosen, own = found[CHOICES], None
  kind = expert_type(model.moe_of(layer).sizes.num_retained)
  none = jnp.iinfo(kind).max
  if logits and LOGITS in found:
    own = to_rows(found[LOGITS], *chosen.gate.shape[:2])
    most = jnp.finfo(dtype).max  # so that none becomes infinite
    own = jnp.clip(own, -most, most).astype(dtype)
  return Recorded(
    expert=jnp.where(chosen.expert < 0, none, chosen.expert).astype(kind),
    gate=chosen.gate.astype(dtype),
    kept=chosen.kept,
    logits=own,
  )
