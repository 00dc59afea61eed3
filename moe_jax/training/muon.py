"""Muon, which orthogonalizes the momentum of each matrix.

https://kellerjordan.github.io/posts/muon and, for its scale and decay in large
models, https://arxiv.org/abs/2502.16982. Every expert of every layer is a
matrix of its own, however they are stacked, and the heads of a projection are
one matrix together. Unlike in Jordan's and PyTorch's Muon, optax corrects the
bias of the running mean, so that updates differ from theirs by about a tenth at
steps 2 and 3, and by less later.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from optax import contrib

from moe_jax.errors import InputError
from moe_jax.layers.parameters import Role
from moe_jax.models.lora import RANK
from moe_jax.options import above, at_least, option, within
from moe_jax.training.optimizer import (
  Optimizer,
  is_names,
  per_matrix,
  stacked,
)
from moe_jax.training.parameter_rules import is_role

# Parts of a model whose kernels are hidden matrices.
_HIDDEN = ('attention', 'expert', 'ffn', 'lstm', 'shared_expert')


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
  """Muon for hidden matrices and experts, Adam for all other parameters.

  Adam trains embeddings, logits, routers, norms and biases, as published. A
  parameter that Muon trains has one moment, half of Adam's state.
  """

  momentum: float = option(
    0.95,
    'Decay per step of the running mean of gradients (Nesterov) that Muon '
    'orthogonalizes; 0 takes the gradient itself.',
    within('[0, 1)'),
  )
  iterations: int = option(
    5,
    'Number of Newton-Schulz iterations by which a matrix is orthogonalized; '
    'each takes three matrix products.',
    at_least(1),
  )
  rms: float = option(
    0.2,
    'Root mean square of the update of a matrix before the learning rate: 0.2 '
    "is that of Adam, so that Adam's rates and decays can be kept. With 0 an "
    'orthogonal matrix is multiplied by the root of max(1, outputs / inputs), '
    'which needs a larger rate.',
    at_least(0),
  )
  adam_rate: float = option(
    1.0,
    'Factor of the learning rate for parameters that Adam trains; at 0 they '
    'keep their values.',
    at_least(0),
  )
  b1: float = option(
    0.9,
    "Decay per step of Adam's first moment; 0 takes the gradient itself.",
    within('[0, 1)'),
  )
  b2: float = option(
    0.98,
    "Decay per step of Adam's second moment; 0 takes the squared gradient.",
    within('[0, 1)'),
  )
  epsilon: float = option(
    1e-8,
    "Number that is added to the root of Adam's second moment, and to the norm "
    'of a matrix before it is orthogonalized.',
    above(0),
  )

  def preconditioner(
    self, axes: Any, roles: Any
  ) -> optax.GradientTransformation:
    """See `Optimizer.preconditioner`."""
    adam = optax.chain(
      optax.scale_by_adam(self.b1, self.b2, self.epsilon),
      optax.scale(self.adam_rate),
    )

    def transform_of(role: Role, names: tuple[str | None, ...]):
      return self._orthogonal(names) if is_hidden(role, names) else adam

    transforms = jax.tree.map(transform_of, roles, axes, is_leaf=is_role)
    return per_matrix(transforms, axes)

  def _orthogonal(
    self, names: tuple[str | None, ...]
  ) -> optax.GradientTransformation:
    """Muon's transformation of a kernel without its stacked axes."""
    sides = dimensions(names[len(stacked(names)) :])

    def scaled(matrix: Any, params: Any) -> Any:
      del params
      return self._scale(*_sizes(matrix.shape, sides)) * matrix

    return optax.chain(
      contrib.scale_by_muon(
        ns_steps=self.iterations,
        beta=self.momentum,
        eps=self.epsilon,
        weight_dimension_numbers=sides,
      ),
      optax.stateless(scaled),
    )

  def _scale(self, inputs: int, outputs: int) -> float:
    """The factor of an orthogonalized matrix."""
    if self.rms:
      return self.rms * math.sqrt(max(inputs, outputs))
    return math.sqrt(max(1.0, outputs / inputs))

  def facts(self, shapes: Any, axes: Any, roles: Any) -> Iterator[str]:
    """A line on the number of parameters that Muon and Adam train."""
    counts: collections.Counter[str] = collections.Counter()
    adam_parts: dict[str, None] = {}
    for role, names, leaf in zip(
      jax.tree.leaves(roles, is_leaf=is_role),
      jax.tree.leaves(axes, is_leaf=is_names),
      jax.tree.leaves(shapes),
      strict=True,
    ):
      hidden = is_hidden(role, names)
      counts['Muon' if hidden else 'Adam'] += leaf.size
      if not hidden:
        adam_parts[
          ' '.join(filter(None, role)) or 'parameters without a role'
        ] = None
    yield (
      f'optimizer: Muon trains {counts["Muon"]:,} parameters; Adam trains '
      f'{counts["Adam"]:,}, at {self.adam_rate:g} of the rate'
      + (f': {", ".join(adam_parts)}' if adam_parts else '')
    )


def is_hidden(role: Role, names: tuple[str | None, ...]) -> bool:
  """Whether a parameter is a kernel between hidden values, as Muon's are.

  A kernel from the residual stream to one number, a gate, is no matrix, and
  neither is the factor of an adapter that leads to such a number.
  """
  hidden = role.form == 'kernel' and role.role in _HIDDEN
  return hidden and names[-2:] not in (('embed', None), (RANK, None))


def dimensions(names: tuple[str | None, ...]) -> contrib.MuonDimensionNumbers:
  """The inputs and the outputs of a kernel, by its logical axes.

  A kernel whose last axis is 'embed' leads from all others to the residual
  stream, and one whose last axis is the rank of an adapter to its other factor;
  any other has its first axis as input.

  Raises:
    ValueError: There are fewer than two axes.
  """
  if len(names) < 2:
    raise InputError(f'a kernel of axes {names} is no matrix')
  split = len(names) - 1 if names[-1] in ('embed', RANK) else 1
  return contrib.MuonDimensionNumbers(
    tuple(range(split)), tuple(range(split, len(names)))
  )


def _sizes(
  shape: Sequence[int], sides: contrib.MuonDimensionNumbers
) -> list[int]:
  """The numbers of inputs and of outputs of a kernel."""
  return [int(np.prod(np.take(shape, side))) for side in sides]
