"""Choices of experts that a model returns in addition to its outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.layers.moe import to_rows
from moe_jax.layers.routers.contract import CHOICES, LOGITS, SOWN, sown
from moe_jax.models.base import Model
from moe_jax.shapes import Leaf


class LayerChoices(NamedTuple):
  """The choices of one sparse layer in one batch.

  Attributes:
    expert: int [B, T, N], the index of the expert; -1 where there is no
      choice: in padding, and where experts choose and this expert did not. N is
      K where tokens choose, and E where experts choose. In recorded traces,
      where experts choose, N is instead the most experts of any token, and a
      token's choices are in descending order of their gates.
    gate: float [B, T, N], the weight of the expert's output before the option
      `output_masking`, float16 or float32; 0 where the choice is not kept.
    kept: bool [B, T, N], whether the router's queues served the choice. Rows
      that were lost because an exchange between devices was full count as
      served; choices that a router's option `second_policy` withheld do not.
    logits: float [B, T, E], the logits that the router's losses are computed
      from, without noise, of the same type as `gate`; None where they are not
      asked for or the router has none. Where merged experts share router
      columns, E is the number of columns.
  """

  expert: Leaf
  gate: Leaf
  kept: Leaf
  logits: Leaf | None = None


# The choices of each sparse layer, by the layer's index; None: none recorded.
Choices = dict[int, LayerChoices] | None
# A function, such as `plainly` or `recording`, from (model, variables, other
# arguments of `model.apply`) to (result of `model.apply`, choices).
Apply = Callable[..., tuple[Any, Choices]]


def plainly(
  model: Model, variables: dict[str, Any], *args: Any, **arguments: Any
) -> tuple[Any, None]:
  """The result of `model.apply`, and None in place of recorded choices.

  It stands in for `recording` where no choices are asked for.
  """
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
  recorded, largest = {}, jnp.finfo(dtype).max
  for i, tree in enumerate(model.stacks.layer_trees(collections[SOWN])):
    if CHOICES not in (sown_values := sown(tree)):
      continue
    choices, router_logits = sown_values[CHOICES], None
    if logits and LOGITS in sown_values:
      router_logits = to_rows(sown_values[LOGITS], *choices.gate.shape[:2])
      # Clipped logits do not become infinite in a narrower type.
      router_logits = jnp.clip(router_logits, -largest, largest).astype(dtype)
    index_type = expert_type(model.stacks.moe_of(i).num_retained)
    recorded[i] = LayerChoices(
      expert=choices.expert.astype(index_type),
      gate=choices.gate.astype(dtype),
      kept=choices.kept,
      logits=router_logits,
    )
  return result, recorded


def expert_type(num_experts: int) -> type[np.integer]:
  """The integer type of recorded expert indices; -1 means no expert."""
  return np.int8 if num_experts <= 128 else np.int16
