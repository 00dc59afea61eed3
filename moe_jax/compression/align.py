"""The order of hidden units in which an expert fits another one best.

A feed-forward computes the same whatever the order of its hidden units, so two
experts are compared and averaged after those of one are permuted: step 1 of
M-SMoE (https://arxiv.org/abs/2310.01334). The fit of two units is the sum of
the products of all their weights. The paper's code takes the weights of the
first and last kernel alone, but gated experts have a third kernel, and there
may be biases.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from moe_jax.errors import InputError
from moe_jax.layers.parameters import Names
from moe_jax.models.flat_trees import Path

HIDDEN = 'expert_mlp'
# The parameters of one expert, by path.
Expert = Mapping[Path, Float[np.ndarray, '...']]


def permutation(
  reference: Expert, expert: Expert, axes: Mapping[Path, Names]
) -> Int[np.ndarray, ' F']:
  """The order of an expert's hidden units that fits the reference's best.

  It maximises the sum of products of all parameters that hidden units have.

  Args:
    reference: The parameters of one expert, without the dimension of experts.
    expert: The parameters of the expert whose units are to be permuted.
    axes: The logical axes of each parameter; hidden units are 'expert_mlp'.

  Returns:
    The unit of the expert that takes the place of each unit of the reference.

  Raises:
    ValueError: The parameters have no hidden units.
  """
  fit = 0.0
  for path, array in reference.items():
    if HIDDEN in axes[path]:
      axis = axes[path].index(HIDDEN)
      fit = fit + _units(array, axis) @ _units(expert[path], axis).T
  if not isinstance(fit, np.ndarray):
    raise InputError(
      f'the experts have the parameters {["/".join(p) for p in reference]}, '
      'none of which has hidden units; only feed-forward experts are aligned'
    )
  return linear_sum_assignment(fit, maximize=True)[1]


def permuted(
  expert: Expert, order: Int[np.ndarray, ' F'], axes: Mapping[Path, Names]
) -> dict[Path, np.ndarray]:
  """The parameters of an expert with its hidden units in this order."""
  return {
    path: np.take(array, order, axes[path].index(HIDDEN))
    if HIDDEN in axes[path]
    else array
    for path, array in expert.items()
  }


def aligned(
  experts: Expert, reference: int, axes: Mapping[Path, Names]
) -> dict[Path, np.ndarray]:
  """The parameters [E, ...] of experts, all aligned to one of them."""
  one_axes = {path: axes[path][1:] for path in experts}
  originals = [of_expert(experts, e) for e in range(_count(experts))]
  aligned_experts = [
    expert
    if e == reference
    else permuted(
      expert, permutation(originals[reference], expert, one_axes), one_axes
    )
    for e, expert in enumerate(originals)
  ]
  return {
    path: np.stack([expert[path] for expert in aligned_experts])
    for path in experts
  }


def of_expert(experts: Expert, expert: int) -> dict[Path, np.ndarray]:
  """The parameters of one expert, from those of all, [E, ...]."""
  return {path: array[expert] for path, array in experts.items()}


def _count(experts: Expert) -> int:
  return len(next(iter(experts.values())))


def _units(array: np.ndarray, axis: int) -> Float[np.ndarray, 'F N']:
  """A row for each hidden unit, in float32."""
  rows = np.moveaxis(np.asarray(array, np.float32), axis, 0)
  return rows.reshape(len(rows), -1)
