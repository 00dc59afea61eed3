"""Finds the arrays of a train state that have a value which is not finite.

Integers and booleans are always finite. No optimizer or router of this project
keeps an infinity on purpose, so no array is excepted (a test takes a step with
each optimizer).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import fetch
from moe_jax.partitioning import path_name
from moe_jax.shapes import Array, Bool

_MOST_LISTED = 4


def flags(tree: Any) -> Bool[Array, ' N']:
  """Whether each of a tree's N floating-point leaves, in order, is finite.

  For a tree without such leaves the result is [True].
  """
  leaves = _floating(tree).values()
  # x - x is 0 for a finite number and NaN for any other. XLA's CPU compiler
  # reads a leaf once for this sum, but for `isfinite(x)` writes an array of
  # booleans. A maximum would not do, as that compiler's ignores NaN.
  return jnp.stack([jnp.isfinite((x - x).sum()) for x in leaves] or [True])


def without_opt_state(state: Any) -> Any:
  """The train state without the optimizer's state, for the `flags` of a step.

  Running means of finite gradients and their squares, or of finite updates, are
  finite where they were before the step. A step whose gradient has a finite
  norm and whose new parameters are finite thus has a finite optimizer state.
  To read this state, too, would take two more passes over the memory of all
  experts. What is saved or restored is checked with its optimizer's state.
  """
  return state.replace(opt_state=())


_compiled_flags = jax.jit(flags)


def names(tree: Any, finite: Bool[np.ndarray, ' N']) -> list[str]:
  """The paths of the leaves whose flag is False.

  Args:
    tree: A tree like the one that `flags` took; shapes are enough.
    finite: The flags on the host.
  """
  return [name for name, good in zip(_floating(tree), finite) if not good]


def not_finite(tree: Any) -> list[str]:
  """The paths of the leaves with a value that is not finite.

  Every process has to call this, as arrays may be split among them.
  """
  # A compiled program takes arrays of one set of devices.
  groups: dict[frozenset[jax.Device], dict[str, Any]] = {}
  for name, leaf in _floating(tree).items():
    groups.setdefault(frozenset(leaf.sharding.device_set), {})[name] = leaf
  return [
    name
    for group in groups.values()
    for name in names(group, np.asarray(fetch(_compiled_flags(group))))
  ]


def listed(paths: list[str]) -> str:
  """The first few paths as text, with the number of further paths."""
  more = len(paths) - _MOST_LISTED
  rest = f' and {more} more' if more > 0 else ''
  return ', '.join(paths[:_MOST_LISTED]) + rest


def _floating(tree: Any) -> dict[str, Any]:
  """The floating-point leaves of a tree, by path."""
  return {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  }
