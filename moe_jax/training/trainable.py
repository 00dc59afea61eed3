"""The parameters that train, and the effect of their choice on a step.

    config.trainable = 'experts + router'

A parameter that does not train has no gradient computed, no state in the
optimizer and no share in clipping or decay, and a router that does not train
keeps its state, such as a balancing bias.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.models.lora import TREE
from moe_jax.models.selection import names_of
from moe_jax.partitioning import path_name


@dataclasses.dataclass(frozen=True)
class Trained:
  """The parameters that train.

  Attributes:
    expression: The expression that selects them.
    names: The names of the parameters that train, such as 'layers/layer_0/w'.
    masks: Booleans that say which experts train, by the name of the parameter,
      for parameters of which only some experts train; dimensions other than
      those of layers and experts have size 1.
  """

  expression: str
  names: frozenset[str]
  masks: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def part(
    self, tree: Any, is_leaf: Callable[[Any], bool] | None = None
  ) -> Any:
    """A tree like the parameters, with None for those that do not train."""

    def trained_leaf(path, leaf):
      return leaf if path_name(path) in self.names else None

    return jax.tree_util.tree_map_with_path(trained_leaf, tree, is_leaf=is_leaf)

  @property
  def masks_digest(self) -> str:
    """The sha256 of the masks; '' if there is none."""
    sha = hashlib.sha256()
    for name, mask in sorted(self.masks.items()):
      sha.update(f'{name} {mask.shape}'.encode() + mask.tobytes())
    return sha.hexdigest() if self.masks else ''

  def count(self, tree: Any) -> int:
    """The number of values of a tree, without experts that do not train."""

    def size_of(path, leaf):
      mask = self.masks.get(path_name(path))
      share = 1 if mask is None else mask.mean()
      return round(leaf.size * share)

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size_of, tree)))

  def stop_gradients(self, params: Any) -> Any:
    """The parameters, without a gradient to the experts that do not train.

    The gradient of these experts is exactly zero; it is computed all the same,
    since experts are stacked in one array.
    """
    return self._other_experts(params, jax.lax.stop_gradient)

  def _other_experts(self, tree: Any, change: Callable[[Any], Any]) -> Any:
    """A tree with `change` applied to the experts that do not train."""

    def one(path, leaf):
      mask = self.masks.get(path_name(path))
      return leaf if mask is None else jnp.where(mask, leaf, change(leaf))

    return jax.tree_util.tree_map_with_path(one, tree) if self.masks else tree

  def optimizer(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """An optimizer of all parameters, which keeps state for this part alone.

    Args:
      inner: The optimizer of trees with None for parameters that do not train.
    """

    def init(params):
      return inner.init(self.part(params))

    def update(updates, state, params=None):
      updates, state = inner.update(updates, state, self.part(params))
      # To add -0.0 keeps the bits of every number, those of -0.0 included.
      return self._other_experts(updates, lambda u: -jnp.zeros_like(u)), state

    return optax.GradientTransformation(init, update)

  def moved(self, state: Any, new: Any) -> Any:
    """The new state of routers, or the old where their modules do not train.

    A module trains if one of its parameters does, or an adapter of one; one
    without parameters trains where all do.

    Args:
      state: The routers' state before a step.
      new: The routers' state after it.
    """
    if self.expression == 'all':
      return new
    names = [name.removeprefix(f'{TREE}/') for name in self.names]

    def one(path, old_leaf, new_leaf):
      module = ''.join(path_name(path).rpartition('/')[:2])
      trains = any(name.startswith(module) for name in names)
      return new_leaf if trains else old_leaf

    return jax.tree_util.tree_map_with_path(one, state, new)


def whole(part: Any, params: Any) -> Any:
  """The parameters, replaced by those of `part` where it has any."""
  return jax.tree.map(
    lambda trained_leaf, leaf: leaf if trained_leaf is None else trained_leaf,
    part,
    params,
    is_leaf=lambda leaf: leaf is None,
  )


def updated(params: Any, updates: Any) -> Any:
  """The parameters after updates, which are None where a parameter stays."""
  return jax.tree.map(
    lambda update, param: (
      param if update is None else optax.apply_updates(param, update)
    ),
    updates,
    params,
    is_leaf=lambda leaf: leaf is None,
  )


def select(expression: str, roles: Any) -> Trained:
  """The parameters that an expression selects; see `selection.names_of`."""
  return Trained(expression, names_of(expression, roles))
